"""Hidden states as fp8 (e4m3) with one float32 scale each, vectorised.

A hidden state of D values travels as D + 4 bytes: its values divided by the scale, rounded to `float8_e4m3fn`, then the
scale. A row of L layers is L of them, one after another, so that a layer with large values costs the others nothing.

    scale = max(max |x| / 448, 2^-126),   x ≈ value · scale,   448 the largest number of e4m3

The error of an element is at most 2^-4 · |x|, or 2^-10 · scale where that is more (e4m3's own subnormal numbers), but
for float32's rounding. Zeros stay zeros, and a state of zeros has the smallest scale.

Shape letters: N hidden states, D hidden size.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from services.contracts import MAX_SCALE, MIN_SCALE, SCALE_BYTES

LARGEST = 448.0
"""The largest number of e4m3."""

BLOCK_ELEMENTS = 2**18
"""Work on the CPU goes on in blocks of so many elements, whose float32 intermediate stays in the cache of a core."""

_FLOAT16_FROM_BITS = 256.0
"""An e4m3's bits, sign and rest put where float16 has them, are its value over 2^8: the exponents' biases are 7, 15."""


def quantise_into(packed_NS: Tensor, states_ND: Tensor) -> None:
    """Write hidden states as fp8 with their scales.

    NaN or infinity in a state makes its scale such, a value above what bfloat16 can hold makes it larger than MAX_SCALE
    (`check_scales`).

    Args:
        packed_NS: uint8 [N, D + 4], on the device of the states; rows may be strided.
        states_ND: [N, D], any float dtype; rows may be strided.
    """
    num_states, hidden_size = states_ND.shape
    assert packed_NS.shape == (num_states, hidden_size + SCALE_BYTES["fp8_e4m3"])
    values_ND = packed_NS[:, :hidden_size].view(torch.float8_e4m3fn)
    scales_N4 = packed_NS[:, hidden_size:]
    step = num_states if states_ND.is_cuda else max(1, BLOCK_ELEMENTS // hidden_size)
    scratch_ND = torch.empty(min(step, num_states), hidden_size, dtype=torch.float32, device=states_ND.device)
    for start in range(0, num_states, max(1, step)):
        block_ND = states_ND[start : start + step]
        # Two reductions over views: `abs` would write the whole block once more.
        largest_N = torch.maximum(block_ND.amax(-1), block_ND.amin(-1).neg()).float()
        scale_N1 = largest_N.div_(LARGEST).clamp_(min=MIN_SCALE)[:, None]
        scaled_ND = torch.div(block_ND, scale_N1, out=scratch_ND[: len(block_ND)])
        values_ND[start : start + step].copy_(scaled_ND)
        scales_N4[start : start + step].copy_(scale_N1.view(torch.uint8))


def dequantise_into(states_ND: Tensor, packed_NS: Tensor) -> None:
    """Read hidden states that `quantise_into` wrote, of checked chunks: e4m3's NaN does not occur.

    Args:
        states_ND: [N, D], bfloat16 or float32, on the device of the packed states; rows may be strided.
        packed_NS: uint8 [N, D + 4]; rows may be strided.
    """
    num_states, hidden_size = states_ND.shape
    assert packed_NS.shape == (num_states, hidden_size + SCALE_BYTES["fp8_e4m3"])
    scale_N1 = scales_of(packed_NS)[:, None]
    values_ND = packed_NS[:, :hidden_size]
    if states_ND.device.type != "cpu":
        states_ND.copy_(values_ND.view(torch.float8_e4m3fn).float().mul_(scale_N1))
        return
    step = max(1, BLOCK_ELEMENTS // hidden_size)
    codes = values_ND.view(torch.int8).numpy()
    for start in range(0, num_states, step):
        # torch converts e4m3 to float one by one, six times slower than float16, for which CPUs have an instruction.
        bits = codes[start : start + step].astype(np.int16)
        bits <<= 7
        bits &= np.int16(-0x4001)
        block_ND = torch.from_numpy(bits).view(torch.float16).float()
        states_ND[start : start + step].copy_(block_ND.mul_(scale_N1[start : start + step] * _FLOAT16_FROM_BITS))


def scales_of(packed_NS: Tensor) -> Tensor:
    """The scales [N], float32, copied out of packed states."""
    scales_N4 = packed_NS[:, packed_NS.shape[1] - SCALE_BYTES["fp8_e4m3"] :]
    return scales_N4.clone(memory_format=torch.contiguous_format).view(torch.float32)[:, 0]


def are_scales_good(scales_N: Tensor) -> Tensor:
    """Which scales [N] are of finite states that bfloat16 can hold: bool [N]."""
    return (scales_N >= MIN_SCALE) & (scales_N <= MAX_SCALE)
