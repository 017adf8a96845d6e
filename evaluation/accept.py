"""The acceptance rule of speculative decoding: which drafts stay, and which token comes after them.

A draft x stays with probability min(1, p_target(x) / p_draft(x)), left to right, up to the first that does not. The
next token is then drawn from max(0, p_target − p_draft), normalised, or from the target's last row if all stayed. The
committed tokens are distributed exactly as the target's own (Leviathan et al. 2023; specs "Decoding, all drafters").

Shapes: n drafts, V vocabulary. All distributions are float32, on both sides: two roundings of the same logits are two
distributions, and acceptance between them is not lossless.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from drafters.drafter import GREEDY_BELOW

SMALLEST_PROBABILITY = 1e-8
"""p_draft is at least this in the ratio; a residual of at most this mass is rounding, not a distribution."""


class Verdict(NamedTuple):
    """What one verification decided."""

    num_accepted: int
    """Drafts that stay, counted from the left."""
    next_token: int
    """The token after them: the bonus token if all stayed, else the correction."""


def is_greedy(temperature: float) -> bool:
    """Whether this temperature means argmax."""
    return temperature < GREEDY_BELOW


def distribution(logits: Tensor, temperature: float) -> Tensor:
    """The float32 distribution that both sides sample from at a temperature above 0: softmax(logits / temperature).

    Args:
        logits: [..., V], any floating dtype.
        temperature: At least `GREEDY_BELOW`.

    Returns:
        [..., V] float32.
    """
    return torch.softmax(logits.float() / temperature, dim=-1)


def draw(probabilities: Tensor, generator: torch.Generator | None) -> int:
    """One token from a distribution [V]."""
    return int(torch.multinomial(probabilities, 1, generator=generator))


def verify_greedy(drafts: Sequence[int], target_choices: Sequence[int]) -> Verdict:
    """The rule with one-hot distributions: a draft stays if it is the target's own choice.

    Args:
        drafts: n draft tokens.
        target_choices: n + 1 tokens, the target's argmax after the anchor and after each draft.
    """
    num_accepted = 0
    for draft, choice in zip(drafts, target_choices, strict=False):
        if draft != choice:
            break
        num_accepted += 1
    return Verdict(num_accepted, target_choices[num_accepted])


def verify_sampled(
    drafts: Tensor, p_draft: Tensor, p_target: Tensor, generator: torch.Generator | None = None
) -> Verdict:
    """The rule above temperature 0.

    Args:
        drafts: [n] int64, each drawn from its row of `p_draft`.
        p_draft: [n, V] float32, what the drafts were drawn from.
        p_target: [n + 1, V] float32, the target after the anchor and after each draft.
        generator: Source of the uniform numbers and of the next token.
    """
    num_drafts = drafts.shape[0]
    if num_drafts == 0:
        return Verdict(0, draw(p_target[0], generator))
    rows = torch.arange(num_drafts, device=drafts.device)
    ratio = p_target[rows, drafts] / p_draft[rows, drafts].clamp_min(SMALLEST_PROBABILITY)
    uniform = torch.rand(num_drafts, generator=generator, device=drafts.device)
    num_accepted = int((uniform < ratio).int().cumprod(0).sum())
    if num_accepted == num_drafts:
        return Verdict(num_accepted, draw(p_target[num_drafts], generator))
    residual = (p_target[num_accepted] - p_draft[num_accepted]).clamp_min_(0)
    if float(residual.sum()) <= SMALLEST_PROBABILITY:
        residual = p_target[num_accepted]
    return Verdict(num_accepted, draw(residual, generator))
