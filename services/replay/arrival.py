"""The one look at a chunk that came over the wire, before it is stored: its size, its checksum, and that it is finite.

Whatever passes is trusted from here on: readers check sizes, but neither checksums nor values again. No torch: the bits
of a float say whether it is finite. fp8 has no infinity and one NaN of each sign; its scales say the rest.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from services.checksum import Payload, verify
from services.contracts import MAX_SCALE, MIN_SCALE, SCALE_BYTES, Chunk, TableSignature, WireDtype
from services.errors import FeatureError, WireError

SIGNED: dict[WireDtype, DTypeLike] = {"bf16": "<i2", "fp16": "<i2", "fp32": "<i4", "fp8_e4m3": "i1"}
UNSIGNED: dict[WireDtype, DTypeLike] = {"bf16": "<u2", "fp16": "<u2", "fp32": "<u4", "fp8_e4m3": "u1"}

BAD_BITS: dict[WireDtype, int] = {"bf16": 0x7F80, "fp16": 0x7C00, "fp32": 0x7F80_0000, "fp8_e4m3": 0x7F}
"""+Infinity, and NaN for fp8; other NaNs lie above it, and the same with the sign bit set are the negative ones."""

SIGN_BIT: dict[WireDtype, int] = {"bf16": 0x8000, "fp16": 0x8000, "fp32": 0x8000_0000, "fp8_e4m3": 0x80}


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
    if not is_finite(payload, signature.dtype, signature.hidden_size):
        bad = _bad_rows(payload, signature.dtype, signature.hidden_size, num_rows)
        raise FeatureError(
            f"{chunk.tensor}: {len(bad)} of rows {chunk.row_start} to {chunk.row_end} hold NaN or infinity as "
            f"{signature.dtype}, first row {chunk.row_start + bad[0]}. Look at the target's dtype (fp16 overflows at "
            "65504) and at its weights"
        )


def is_finite(payload: Payload, dtype: WireDtype, hidden_size: int) -> bool:
    """Whether no value of a payload is NaN or infinite, from two passes over its bits and no copy.

    Of fp8 also whether each scale is one that `services.fp8` writes: finite, above zero, not too large for bfloat16.
    """
    if memoryview(payload).nbytes == 0:
        return True
    values, scales = _states(payload, dtype, hidden_size)
    # As signed integers all floats with the sign bit are negative, so the largest one is the worst positive float; as
    # unsigned integers the largest one is the worst negative float, if there is any.
    worst_positive = int(values.view(SIGNED[dtype]).max())
    worst_negative = int(values.max())
    is_good = worst_positive < BAD_BITS[dtype] and worst_negative < BAD_BITS[dtype] | SIGN_BIT[dtype]
    return is_good and (scales is None or bool(_are_good(scales).all()))


def _states(payload: Payload, dtype: WireDtype, hidden_size: int) -> tuple[NDArray[Any], NDArray[Any] | None]:
    """The hidden states' bits, one a row, and their scales if the dtype has any."""
    if SCALE_BYTES[dtype] == 0:
        return np.frombuffer(payload, UNSIGNED[dtype]).reshape(-1, hidden_size), None
    states = np.frombuffer(payload, np.uint8).reshape(-1, hidden_size + SCALE_BYTES[dtype])
    return states[:, :hidden_size], np.ascontiguousarray(states[:, hidden_size:]).view("<f4")[:, 0]


def _are_good(scales: NDArray[Any]) -> NDArray[Any]:
    return (scales >= MIN_SCALE) & (scales <= MAX_SCALE)


def _bad_rows(payload: Payload, dtype: WireDtype, hidden_size: int, num_rows: int) -> list[int]:
    values, scales = _states(payload, dtype, hidden_size)
    is_bad = ((values & BAD_BITS[dtype]) == BAD_BITS[dtype]).any(axis=1)
    if scales is not None:
        is_bad |= ~_are_good(scales)
    return [int(row) for row in np.flatnonzero(is_bad.reshape(num_rows, -1).any(axis=1))]
