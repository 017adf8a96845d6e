"""Tensors as bytes: layout by hand, round trips, and what is refused."""

from __future__ import annotations

import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from services.codec import TORCH_DTYPES, byte_view, check_finite, decode
from services.contracts import DTYPE_BYTES, WireDtype
from services.errors import FeatureError, WireError


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
    dtype=st.sampled_from(sorted(TORCH_DTYPES)),
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
@pytest.mark.parametrize("dtype", TORCH_DTYPES.values())
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
