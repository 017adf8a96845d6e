"""Drawing tokens for many sequences at once, each with random numbers of its own."""

from __future__ import annotations

import torch
from torch import Tensor


def draw_tokens(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """One token a row, by inversion: the first whose cumulative probability exceeds the uniform number.

    In float64, where sums over any vocabulary are exact enough that no token gains or loses by rounding.

    Args:
        probabilities: [B, V] ≥ 0; rows need not sum to 1.
        uniforms: [B] float64 in [0, 1).

    Returns:
        [B] int64.
    """
    cumulative = probabilities.double().cumsum(dim=-1)
    thresholds = uniforms[:, None] * cumulative[:, -1:]
    # A product that rounds up to the whole mass would land past the last token that has any.
    thresholds = thresholds.minimum(torch.nextafter(cumulative[:, -1:], cumulative.new_zeros(())))
    return torch.searchsorted(cumulative, thresholds, right=True)[:, 0]
