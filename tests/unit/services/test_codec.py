"""Tensors as bytes: layout by hand, round trips, and what is refused."""

from __future__ import annotations

import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from services.codec import TORCH_DTYPES, byte_view, check_finite, check_packed, decode, decode_into, encode_into
from services.contracts import DTYPE_BYTES, WireDtype, hidden_state_bytes
from services.errors import FeatureError, WireError

PLAIN: tuple[WireDtype, ...] = ("bf16", "fp16", "fp32")
"""Wire dtypes without scales."""


def test_byte_view_is_little_endian_rows() -> None:
    tensor = torch.tensor([[1.0, -2.0], [0.5, 3.0]])
    assert bytes(byte_view(tensor)) == struct.pack("<4f", 1.0, -2.0, 0.5, 3.0)


def test_byte_view_of_bfloat16_is_the_upper_half_of_float32() -> None:
    assert bytes(byte_view(torch.tensor([1.5], dtype=torch.bfloat16))) == struct.pack("<f", 1.5)[2:]


def test_byte_view_shares_memory() -> None:
    tensor = torch.zeros(2, 2)
    byte_view(tensor)[4:8] = struct.pack("<f", 7.0)
    assert tensor.tolist() == [[0.0, 7.0], [0.0, 0.0]]


def test_byte_view_refuses_strided() -> None:
    with pytest.raises(ValueError, match="contiguous CPU tensor"):
        byte_view(torch.zeros(2, 3).t())


def test_dtype_sizes_agree_with_contracts() -> None:
    assert {name: dtype.itemsize for name, dtype in TORCH_DTYPES.items()} == DTYPE_BYTES


@given(
    dtype=st.sampled_from(PLAIN),
    rows=st.integers(0, 5),
    width=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_decode_inverts_byte_view(dtype: WireDtype, rows: int, width: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensor = torch.randn(rows, width, generator=generator).to(TORCH_DTYPES[dtype])
    decoded = decode(byte_view(tensor), dtype, width)
    assert decoded.dtype == tensor.dtype
    assert decoded.shape == tensor.shape
    assert torch.equal(decoded, tensor)


def test_decode_refuses_a_partial_row() -> None:
    with pytest.raises(WireError, match=r"10 bytes is no whole number of 8-byte rows \(fp32\)"):
        decode(bytes(10), "fp32", 2)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [TORCH_DTYPES[name] for name in PLAIN])
def test_check_finite_names_the_row(bad: float, dtype: torch.dtype) -> None:
    features = torch.ones(4, 3, dtype=dtype)
    features[2, 1] = bad
    with pytest.raises(FeatureError, match=r"context of sample 9: 1 of 4 rows .* first row 2"):
        check_finite(features, "context of sample 9")


def test_check_finite_accepts_the_largest_values_and_no_rows() -> None:
    check_finite(torch.tensor([[65504.0, -65504.0]], dtype=torch.float16), "features")
    check_finite(torch.empty(0, 3), "features")


def test_check_finite_sees_overflow_of_the_conversion() -> None:
    with pytest.raises(FeatureError, match="float16"):
        check_finite(torch.tensor([[70000.0]]).to(torch.float16), "features")


def packed(states: torch.Tensor, dtype: WireDtype) -> torch.Tensor:
    """[N, k, D] states as they travel: uint8 [N, k · bytes of a state]."""
    rows = torch.empty(states.shape[0], states.shape[1], hidden_state_bytes(states.shape[2], dtype), dtype=torch.uint8)
    for place in range(states.shape[1]):
        encode_into(rows[:, place], states[:, place], dtype)
    return rows.flatten(1)


def a_tensor(rows: int, states: int, hidden_size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, states, hidden_size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rows_dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dtype", PLAIN)
def test_decode_into_converts_as_torch_does(dtype: WireDtype, rows_dtype: torch.dtype) -> None:
    states = a_tensor(5, 3, 8)
    rows = torch.zeros(5, 24, dtype=rows_dtype)
    decode_into(rows, byte_view(packed(states, dtype)), dtype, 8)
    assert torch.equal(rows, states.to(TORCH_DTYPES[dtype]).to(rows_dtype).flatten(1))


@pytest.mark.parametrize("rows_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("hidden_size", [1, 5, 8])
def test_decode_into_undoes_the_scales_of_fp8(hidden_size: int, rows_dtype: torch.dtype) -> None:
    states = a_tensor(6, 2, hidden_size)
    states[:, 1] *= 1000
    rows = torch.zeros(6, 2 * hidden_size, dtype=rows_dtype)
    decode_into(rows, bytes(byte_view(packed(states, "fp8_e4m3"))), "fp8_e4m3", hidden_size)
    torch.testing.assert_close(rows.float(), states.flatten(1), rtol=2**-4 + 2**-8, atol=0.05 * 2**-5)
    exact = decode(byte_view(packed(states, "fp8_e4m3")), "fp8_e4m3", 2 * hidden_size, hidden_size=hidden_size)
    assert exact.dtype == torch.float32
    assert torch.equal(rows, exact.to(rows_dtype))


@pytest.mark.parametrize("dtype", sorted(TORCH_DTYPES))
def test_decode_into_fills_a_slice_and_nothing_beside_it(dtype: WireDtype) -> None:
    states = a_tensor(3, 1, 4)
    rows = torch.full((7, 4), 9.0)
    # At an odd place in read-only memory, as payloads lie in a received message.
    message = b"odd" + bytes(byte_view(packed(states, dtype)))
    decode_into(rows[2:5], memoryview(message)[3:], dtype, 4)
    assert (rows[:2] == 9).all()
    assert (rows[5:] == 9).all()
    torch.testing.assert_close(rows[2:5], states[:, 0], rtol=2**-4, atol=2**-7)


def test_decode_into_takes_no_rows() -> None:
    decode_into(torch.empty(0, 4), b"", "fp8_e4m3", 4)


@pytest.mark.parametrize("dtype", sorted(TORCH_DTYPES))
@pytest.mark.parametrize("more", [-1, 1])
def test_decode_into_refuses_another_length(dtype: WireDtype, more: int) -> None:
    row_bytes = 2 * hidden_state_bytes(4, dtype)
    with pytest.raises(WireError, match=rf"is not 3 rows of {row_bytes} bytes \({dtype}\)"):
        decode_into(torch.zeros(3, 8), bytes(3 * row_bytes + more), dtype, 4)


def test_decode_into_refuses_strided_rows() -> None:
    with pytest.raises(ValueError, match="contiguous CPU tensor"):
        decode_into(torch.zeros(4, 3).t(), bytes(48), "fp32", 4)


def test_decode_of_fp8_asks_for_the_hidden_size() -> None:
    with pytest.raises(ValueError, match="give hidden_size"):
        decode(bytes(8), "fp8_e4m3", 4)
    with pytest.raises(ValueError, match="rows of 5 elements are no whole number of hidden states of size 4"):
        decode(bytes(8), "fp8_e4m3", 5, hidden_size=4)


@pytest.mark.parametrize("dtype", sorted(TORCH_DTYPES))
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_check_packed_names_the_row(dtype: WireDtype, bad: float) -> None:
    states = a_tensor(4, 2, 3)
    check_packed(packed(states, dtype), dtype, 3, "context of sample 9")
    states[2, 1, 0] = bad
    with pytest.raises(FeatureError, match=r"context of sample 9: 1 of 4 rows hold NaN.* first row 2"):
        check_packed(packed(states, dtype), dtype, 3, "context of sample 9")
