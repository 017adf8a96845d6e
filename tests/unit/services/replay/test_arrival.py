"""What may enter a table: chunks of the right width, whose bytes came whole, and whose values are finite."""

from __future__ import annotations

import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from services.checksum import crc32c
from services.contracts import Chunk, TableSignature, WireDtype
from services.errors import FeatureError, WireError
from services.replay.arrival import check_arrival, is_finite

SIGNATURE = TableSignature(fingerprint="f", layer_ids=(0, 1), hidden_size=2, dtype="bf16")
DTYPES: dict[WireDtype, tuple[torch.dtype, torch.dtype]] = {
    "bf16": (torch.bfloat16, torch.int16),
    "fp16": (torch.float16, torch.int16),
    "fp32": (torch.float32, torch.int32),
}


def make_chunk(payload: bytes, *, rows: int, tensor: str = "context", start: int = 0) -> Chunk:
    return Chunk.model_validate(
        {
            "tensor": tensor,
            "row_start": start,
            "row_end": start + rows,
            "num_bytes": len(payload),
            "crc32c": crc32c(payload),
        }
    )


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_finite_is_what_torch_says_for_every_16_bit_float(dtype: WireDtype) -> None:
    bits = torch.arange(-(2**15), 2**15).to(torch.int16)
    wanted = torch.isfinite(bits.view(DTYPES[dtype][0])).tolist()
    assert [is_finite(struct.pack("<h", value), dtype) for value in bits.tolist()] == wanted


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=8))
def test_finite_is_what_torch_says_for_32_bit_floats(bits: list[int]) -> None:
    payload = struct.pack(f"<{len(bits)}I", *bits)
    values = torch.frombuffer(bytearray(payload), dtype=torch.float32)
    assert is_finite(payload, "fp32") == bool(torch.isfinite(values).all())


@pytest.mark.parametrize("value", [float("nan"), -float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_single_bad_value_among_large_ones_is_found(dtype: WireDtype, value: float) -> None:
    features = torch.full((1000,), torch.finfo(DTYPES[dtype][0]).max, dtype=DTYPES[dtype][0])
    features[::2] *= -1
    payload = features.view(torch.uint8).numpy().tobytes()
    assert is_finite(payload, dtype)
    features[501] = value
    assert not is_finite(features.view(torch.uint8).numpy().tobytes(), dtype)


def test_chunk_without_bytes_is_finite() -> None:
    assert is_finite(b"", "bf16")


def test_good_chunks_pass() -> None:
    check_arrival(make_chunk(bytes(16), rows=2), bytes(16), SIGNATURE)
    check_arrival(make_chunk(bytes(8), rows=2, tensor="last"), memoryview(bytes(8)), SIGNATURE)


@pytest.mark.parametrize(("tensor", "num_bytes"), [("context", 8), ("context", 32), ("last", 16), ("last", 4)])
def test_rows_of_another_width_or_dtype_are_refused(tensor: str, num_bytes: int) -> None:
    payload = bytes(num_bytes)
    with pytest.raises(WireError, match=rf"{tensor} came in {num_bytes} bytes, .* \(2 layers of size 2 as bf16\)"):
        check_arrival(make_chunk(payload, rows=2, tensor=tensor), payload, SIGNATURE)


def test_flipped_bit_is_refused() -> None:
    payload = bytes(15) + b"\x01"
    with pytest.raises(WireError, match="checksum of 16 bytes"):
        check_arrival(make_chunk(bytes(16), rows=2), payload, SIGNATURE)


def test_payload_cut_short_is_refused() -> None:
    with pytest.raises(WireError, match="14 bytes came, 16 were promised"):
        check_arrival(make_chunk(bytes(16), rows=2), bytes(14), SIGNATURE)


def test_bad_rows_are_counted_and_the_first_is_named() -> None:
    rows = torch.zeros(5, 4, dtype=torch.bfloat16)
    rows[2, 3], rows[4, 0] = float("nan"), float("-inf")
    payload = rows.view(torch.uint8).numpy().tobytes()
    with pytest.raises(FeatureError, match="context: 2 of rows 10 to 15 hold NaN or infinity as bf16, first row 12"):
        check_arrival(make_chunk(payload, rows=5, start=10), payload, SIGNATURE)
