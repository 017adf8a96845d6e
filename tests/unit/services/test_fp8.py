"""fp8 with a scale a hidden state: the layout by hand, the bound of the error, and the values at the edges."""

from __future__ import annotations

import struct

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from services.codec import byte_view
from services.contracts import MAX_SCALE, MIN_SCALE
from services.fp8 import BLOCK_ELEMENTS, LARGEST, are_scales_good, dequantise_into, quantise_into, scales_of

BF16_LARGEST = float(torch.finfo(torch.bfloat16).max)
FLOAT32_ROUNDING = 2.0**-22
SUBNORMAL = 2.0**-6
"""Below it e4m3's numbers are evenly spaced."""


def packed_like(states: Tensor) -> Tensor:
    packed = torch.full((len(states), states.shape[1] + 4), 0xAB, dtype=torch.uint8)
    quantise_into(packed, states)
    return packed


def through(states: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    out = torch.full(states.shape, float("nan"), dtype=dtype)
    dequantise_into(out, packed_like(states))
    return out


def assert_within_bound(states: Tensor, back: Tensor) -> None:
    """The error allowed of each element, computed in float64; what comes back is rounded once more to its own dtype."""
    rounding = torch.finfo(back.dtype)
    rounding_absolute = rounding.smallest_normal * rounding.eps / 2  # between its subnormal numbers
    exact, error = states.double(), (back.double() - states.double()).abs()
    scale = (exact.abs().amax(-1, keepdim=True) / LARGEST).clamp(min=MIN_SCALE)
    relative = (2.0**-4 + FLOAT32_ROUNDING + rounding.eps) * exact.abs() + rounding_absolute
    absolute = (2.0**-10 + FLOAT32_ROUNDING) * scale + rounding_absolute
    is_normal = exact.abs() >= SUBNORMAL * scale * (1 + FLOAT32_ROUNDING)
    assert (error <= torch.where(is_normal, relative, torch.maximum(relative, absolute))).all()


def test_layout_is_values_and_then_the_scale() -> None:
    packed = packed_like(torch.tensor([[448.0, -1.0, 0.0], [0.0, 0.875, 1.75]]))
    # 448 is 0 1111 110; 1 is 0 0111 000. The second state's scale is 1.75 / 448 = 2^-8: 0.875 is 224 = 0 1110 110.
    assert bytes(byte_view(packed[0])) == bytes([0x7E, 0xB8, 0x00]) + struct.pack("<f", 1.0)
    assert bytes(byte_view(packed[1])) == bytes([0x00, 0x76, 0x7E]) + struct.pack("<f", 2.0**-8)
    assert scales_of(packed).tolist() == [1.0, 2.0**-8]


def test_every_code_comes_back_as_torch_reads_it() -> None:
    codes = torch.tensor([code for code in range(256) if code & 0x7F != 0x7F], dtype=torch.uint8)
    scale = torch.tensor([3.0]).view(torch.uint8)
    back = torch.empty(1, len(codes))
    dequantise_into(back, torch.cat([codes, scale])[None])
    assert torch.equal(back[0], codes.view(torch.float8_e4m3fn).float() * 3)


floats = st.floats(-BF16_LARGEST, BF16_LARGEST, width=32)


@given(
    st.integers(1, 9).flatmap(lambda width: st.lists(st.lists(floats, min_size=width, max_size=width), min_size=1)),
)
@example([[0.0, -0.0]])
@example([[BF16_LARGEST, -BF16_LARGEST]])
@example([[3e38, 1.0]])
@example([[1e-45, -1e-45], [1e-38, 2e-39]])
@example([[448.0, 0.015625, 0.014, 0.0009765625, 0.00097]])
def test_error_stays_within_the_bound(rows: list[list[float]]) -> None:
    states = torch.tensor(rows)
    assert_within_bound(states, through(states))


@pytest.mark.parametrize("exponent", [-120, -30, 0, 30, 110])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_of_gaussian_states_stays_within_the_bound_whatever_their_size(exponent: int, dtype: torch.dtype) -> None:
    states = (torch.randn(50, 300, generator=torch.Generator().manual_seed(exponent)) * 2.0**exponent).to(dtype)
    assert_within_bound(states, through(states))
    assert_within_bound(states, through(states, torch.bfloat16))


def test_zeros_stay_zeros_with_a_scale_above_zero() -> None:
    states = torch.zeros(2, 5)
    assert torch.equal(through(states), states)
    assert scales_of(packed_like(states)).tolist() == [MIN_SCALE, MIN_SCALE]


def test_largest_element_comes_back_but_for_rounding() -> None:
    states = torch.tensor([[0.1, -7.3], [1e30, 2e-30]])
    largest = states.abs().amax(-1)
    torch.testing.assert_close(through(states).abs().amax(-1), largest, rtol=2.0**-22, atol=0)


def test_states_of_bfloat16s_largest_come_back_finite_in_bfloat16() -> None:
    states = torch.tensor([[BF16_LARGEST, -BF16_LARGEST, 1.0]])
    back = through(states, torch.bfloat16)
    assert back[0, :2].tolist() == [BF16_LARGEST, -BF16_LARGEST]
    assert are_scales_good(scales_of(packed_like(states))).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), 3.4e38])
def test_states_that_cannot_travel_have_bad_scales(bad: float) -> None:
    states = torch.ones(3, 4)
    states[1, 2] = bad
    assert are_scales_good(scales_of(packed_like(states))).tolist() == [True, False, True]


def test_bounds_of_scales_are_those_of_good_ones() -> None:
    scales = torch.tensor([MIN_SCALE, MAX_SCALE, 0.0, -1.0, MIN_SCALE / 2, MAX_SCALE * 1.01, float("nan")])
    assert are_scales_good(scales).tolist() == [True, True, False, False, False, False, False]


def test_strided_rows_are_written_and_read_in_place() -> None:
    states = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    wide = torch.zeros(6, 3, 12, dtype=torch.uint8)
    for layer in range(3):
        quantise_into(wide[:, layer], states[:, :].mul(layer + 1))
    assert torch.equal(wide[:, 1], packed_like(states * 2))
    back = torch.zeros(6, 20)
    dequantise_into(back[:, 4:12], wide[:, 2])
    assert torch.equal(back[:, 4:12], through(states * 3))
    assert not back[:, :4].any()


def test_blocks_leave_no_seam() -> None:
    hidden_size = 1000
    states = torch.randn(
        2 * (BLOCK_ELEMENTS // hidden_size) + 3, hidden_size, generator=torch.Generator().manual_seed(1)
    )
    whole = through(states)
    assert torch.equal(whole, torch.cat([through(states[row : row + 1]) for row in range(len(states))]))


def test_no_states_are_nothing() -> None:
    assert through(torch.empty(0, 4)).shape == (0, 4)
    assert through(torch.empty(0, BLOCK_ELEMENTS + 1)).shape == (0, BLOCK_ELEMENTS + 1)


def test_state_larger_than_a_block_goes_by_itself() -> None:
    states = torch.randn(2, BLOCK_ELEMENTS + 1, generator=torch.Generator().manual_seed(2))
    assert_within_bound(states, through(states))
