"""The one look at a chunk that came over the wire, before it is stored: its size, its checksum, and that it is finite.

Whatever passes is trusted from here on: readers check sizes, but neither checksums nor values again. No torch: the bits
of a float say whether it is finite.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import DTypeLike

from services.checksum import Payload, verify
from services.contracts import Chunk, TableSignature, WireDtype
from services.errors import FeatureError, WireError

SIGNED: dict[WireDtype, DTypeLike] = {"bf16": "<i2", "fp16": "<i2", "fp32": "<i4"}
UNSIGNED: dict[WireDtype, DTypeLike] = {"bf16": "<u2", "fp16": "<u2", "fp32": "<u4"}

INFINITY_BITS: dict[WireDtype, int] = {"bf16": 0x7F80, "fp16": 0x7C00, "fp32": 0x7F80_0000}
"""+Infinity; NaNs lie above it, and the same with the sign bit set are -infinity and the negative NaNs."""

SIGN_BIT: dict[WireDtype, int] = {"bf16": 0x8000, "fp16": 0x8000, "fp32": 0x8000_0000}


def check_arrival(chunk: Chunk, payload: Payload, signature: TableSignature) -> None:
    """Check a chunk against the table that it shall go into.

    Raises:
        WireError: Its rows have another width or dtype than the table's, or length or checksum differ.
        FeatureError: A value is NaN or infinite.
    """
    row_bytes = signature.context_row_bytes if chunk.tensor == "context" else signature.last_row_bytes
    num_rows = chunk.row_end - chunk.row_start
    if chunk.num_bytes != num_rows * row_bytes:
        raise WireError(
            f"rows {chunk.row_start} to {chunk.row_end} of {chunk.tensor} came in {chunk.num_bytes} bytes, the replay "
            f"table holds rows of {row_bytes} bytes ({len(signature.layer_ids)} layers of size {signature.hidden_size} "
            f"as {signature.dtype}): all targets of a run must serve the same model"
        )
    verify(chunk, payload)
    if not is_finite(payload, signature.dtype):
        bad = _bad_rows(payload, signature.dtype, num_rows)
        raise FeatureError(
            f"{chunk.tensor}: {len(bad)} of rows {chunk.row_start} to {chunk.row_end} hold NaN or infinity as "
            f"{signature.dtype}, first row {chunk.row_start + bad[0]}. Look at the target's dtype (fp16 overflows at "
            "65504) and at its weights"
        )


def is_finite(payload: Payload, dtype: WireDtype) -> bool:
    """Whether no value of a payload is NaN or infinite, from two passes over its bits and no copy."""
    if memoryview(payload).nbytes == 0:
        return True
    infinity = INFINITY_BITS[dtype]
    # As signed integers all floats with the sign bit are negative, so the largest one is the worst positive float; as
    # unsigned integers the largest one is the worst negative float, if there is any.
    worst_positive = int(np.frombuffer(payload, SIGNED[dtype]).max())
    worst_negative = int(np.frombuffer(payload, UNSIGNED[dtype]).max())
    return worst_positive < infinity and worst_negative < infinity | SIGN_BIT[dtype]


def _bad_rows(payload: Payload, dtype: WireDtype, num_rows: int) -> list[int]:
    bits = np.frombuffer(payload, UNSIGNED[dtype]).reshape(num_rows, -1)
    infinity = INFINITY_BITS[dtype]
    return [int(row) for row in np.flatnonzero(((bits & infinity) == infinity).any(axis=1))]
