"""CRC-32C of chunk payloads, by the CPU's own instruction where it has one."""

from __future__ import annotations

import google_crc32c
import numpy as np

from services.contracts import Chunk
from services.errors import WireError

Payload = bytes | bytearray | memoryview


def crc32c(payload: Payload) -> int:
    """CRC-32C (Castagnoli) of a buffer's bytes, without copying them."""
    # The extension refuses memoryviews but takes arrays, and an array over a view costs no copy.
    return int(google_crc32c.value(np.frombuffer(payload, dtype=np.uint8)))


def verify(chunk: Chunk, payload: Payload) -> None:
    """Check a payload against its chunk's length and checksum.

    Raises:
        WireError: Either of them differs.
    """
    num_bytes = memoryview(payload).nbytes
    where = f"rows {chunk.row_start} to {chunk.row_end} of {chunk.tensor}"
    if num_bytes != chunk.num_bytes:
        raise WireError(f"{where}: {num_bytes} bytes came, {chunk.num_bytes} were promised; capture the sample again")
    actual = crc32c(payload)
    if actual != chunk.crc32c:
        raise WireError(
            f"{where}: checksum of {num_bytes} bytes is {actual:08x}, {chunk.crc32c:08x} was promised; "
            "capture the sample again"
        )
