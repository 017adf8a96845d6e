"""What may enter a table: chunks of the right width, whose bytes came whole, and whose values are finite."""

from __future__ import annotations

import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from services.checksum import crc32c
from services.contracts import MAX_SCALE, MIN_SCALE, Chunk, TableSignature, WireDtype
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
    assert [is_finite(struct.pack("<h", value), dtype, 1) for value in bits.tolist()] == wanted


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=8))
def test_finite_is_what_torch_says_for_32_bit_floats(bits: list[int]) -> None:
    payload = struct.pack(f"<{len(bits)}I", *bits)
    values = torch.frombuffer(bytearray(payload), dtype=torch.float32)
    assert is_finite(payload, "fp32", 1) == bool(torch.isfinite(values).all())


@pytest.mark.parametrize("value", [float("nan"), -float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_single_bad_value_among_large_ones_is_found(dtype: WireDtype, value: float) -> None:
    features = torch.full((1000,), torch.finfo(DTYPES[dtype][0]).max, dtype=DTYPES[dtype][0])
    features[::2] *= -1
    payload = features.view(torch.uint8).numpy().tobytes()
    assert is_finite(payload, dtype, 10)
    features[501] = value
    assert not is_finite(features.view(torch.uint8).numpy().tobytes(), dtype, 10)


def test_chunk_without_bytes_is_finite() -> None:
    assert is_finite(b"", "bf16", 1)


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


FP8 = SIGNATURE.model_copy(update={"dtype": "fp8_e4m3"})


def fp8_state(*codes: int, scale: float = 1.0) -> bytes:
    return bytes(codes) + struct.pack("<f", scale)


def test_fp8_is_bad_at_its_two_nans_alone() -> None:
    bad = [code for code in range(256) if not is_finite(fp8_state(code, 0x7E), "fp8_e4m3", 2)]
    assert bad == [0x7F, 0xFF]
    assert all(torch.tensor(bad, dtype=torch.uint8).view(torch.float8_e4m3fn).float().isnan())


def test_bytes_of_scales_are_no_fp8_numbers() -> None:
    # 0x7F and 0xFF within a good scale.
    assert is_finite(fp8_state(0, 0, scale=struct.unpack("<f", b"\xff\x7f\xff\x3f")[0]), "fp8_e4m3", 2)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), 0.0, -1.0, MIN_SCALE / 2, MAX_SCALE * 1.01])
def test_scales_that_we_never_write_are_refused(scale: float) -> None:
    payload = b"".join([fp8_state(1, 2), fp8_state(3, 4), fp8_state(5, 6), fp8_state(7, 8, scale=scale)])
    with pytest.raises(FeatureError, match="context: 1 of rows 4 to 6 hold NaN or infinity as fp8_e4m3, first row 5"):
        check_arrival(make_chunk(payload, rows=2, start=4), payload, FP8)


def test_fp8_rows_carry_their_scales() -> None:
    payload = fp8_state(1, 2) + fp8_state(3, 4, scale=MAX_SCALE)
    check_arrival(make_chunk(payload, rows=1), payload, FP8)
    check_arrival(make_chunk(payload, rows=2, tensor="last"), payload, FP8)
    with pytest.raises(WireError, match=r"came in 8 bytes, .* rows of 12 bytes \(2 layers of size 2 as fp8_e4m3\)"):
        check_arrival(make_chunk(bytes(8), rows=2), bytes(8), FP8)


def test_checksum_covers_the_scales() -> None:
    payload = fp8_state(1, 2) + fp8_state(3, 4)
    damaged = fp8_state(1, 2) + fp8_state(3, 4, scale=2.0)
    with pytest.raises(WireError, match="checksum of 12 bytes"):
        check_arrival(make_chunk(payload, rows=1), damaged, FP8)


def test_nan_among_fp8_rows_is_named() -> None:
    payload = fp8_state(1, 2) + fp8_state(3, 0xFF)
    with pytest.raises(FeatureError, match="last: 1 of rows 0 to 2 hold NaN or infinity as fp8_e4m3, first row 1"):
        check_arrival(make_chunk(payload, rows=2, tensor="last"), payload, FP8)
