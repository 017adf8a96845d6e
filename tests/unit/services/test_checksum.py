"""CRC-32C against published values, over every kind of buffer a payload comes in."""

from __future__ import annotations

import google_crc32c
import pytest

from services.checksum import crc32c, verify
from services.contracts import Chunk
from services.errors import WireError

CHECK_INPUT = b"123456789"
CHECK_VALUE = 0xE3069283  # the check value of CRC-32C in the catalogue of parametrised CRCs
ZEROS_VALUE = 0x8A9136AA  # 32 bytes of zeros, RFC 3720 B.4


def _chunk(payload: bytes, crc: int) -> Chunk:
    return Chunk(tensor="context", row_start=4, row_end=7, num_bytes=len(payload), crc32c=crc)


def test_crc32c_known_vectors() -> None:
    assert crc32c(CHECK_INPUT) == CHECK_VALUE
    assert crc32c(bytes(32)) == ZEROS_VALUE


def test_crc32c_same_for_every_buffer() -> None:
    assert crc32c(bytearray(CHECK_INPUT)) == CHECK_VALUE
    assert crc32c(memoryview(CHECK_INPUT)) == CHECK_VALUE
    assert crc32c(memoryview(b"xx" + CHECK_INPUT + b"y")[2:-1]) == CHECK_VALUE


def test_verify_accepts_what_was_promised() -> None:
    verify(_chunk(CHECK_INPUT, CHECK_VALUE), memoryview(CHECK_INPUT))


def test_verify_refuses_a_flipped_bit() -> None:
    with pytest.raises(WireError, match=r"rows 4 to 7 of context: checksum .* e3069283 was promised"):
        verify(_chunk(CHECK_INPUT, CHECK_VALUE), b"123456788")


def test_verify_refuses_missing_bytes() -> None:
    with pytest.raises(WireError, match="8 bytes came, 9 were promised"):
        verify(_chunk(CHECK_INPUT, CHECK_VALUE), CHECK_INPUT[:-1])


def test_checksum_is_computed_by_the_compiled_library() -> None:
    assert google_crc32c.implementation == "c", "the package's own Python code is hundreds of times slower"
