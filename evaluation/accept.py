"""The acceptance rule of speculative decoding: which drafts stay, and which token comes after them.

A draft x stays with probability min(1, p_target(x) / p_draft(x)), left to right, up to the first that does not. The
next token is then drawn from max(0, p_target − p_draft), normalised, or from the target's last row if all stayed. The
committed tokens are distributed exactly as the target's own (Leviathan et al. 2023; specs "Decoding, all drafters").

Shapes: B sequences, n drafts, V vocabulary. All distributions are float32, on both sides: two roundings of the same
logits are two distributions, and acceptance between them is not lossless.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from drafters.drafter import GREEDY_BELOW, Proposal
from drafters.sampling import draw_tokens

SMALLEST_PROBABILITY = 1e-8
"""p_draft is at least this in the ratio; a residual of at most this mass is rounding, not a distribution."""


class Verdicts(NamedTuple):
    """What one verification decided for each sequence."""

    num_accepted: Tensor
    """[B] drafts that stay, counted from the left."""
    next_tokens: Tensor
    """[B] the token after them: the bonus token if all stayed, else the correction."""


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


def verify_greedy(proposal: Proposal, target_choices: Tensor) -> Verdicts:
    """The rule with one-hot distributions: a draft stays if it is the target's own choice.

    Args:
        proposal: Up to n drafts a sequence.
        target_choices: [B, n + 1] the target's argmax after the anchor and after each draft.
    """
    num_accepted = _leading(proposal.token_ids == target_choices[:, :-1], proposal)
    return Verdicts(num_accepted, target_choices.gather(1, num_accepted[:, None])[:, 0])


def verify_sampled(proposal: Proposal, p_target: Tensor, uniforms: Tensor) -> Verdicts:
    """The rule above temperature 0.

    Args:
        proposal: Up to n drafts a sequence, each drawn from its row of `proposal.probabilities`.
        p_target: [B, n + 1, V] float32, the target after the anchor and after each draft.
        uniforms: [B, n + 1] float64 in [0, 1): one for each draft, one for the next token.
    """
    drafts, p_draft = proposal.token_ids, proposal.probabilities
    num_drafts = drafts.shape[1]
    if not num_drafts:
        return Verdicts(drafts.new_zeros(len(drafts)), draw_tokens(p_target[:, 0], uniforms[:, 0]))
    assert p_draft is not None, "a drafter returns probabilities above temperature 0"
    ratio = _of(drafts, p_target[:, :-1]) / _of(drafts, p_draft).clamp_min(SMALLEST_PROBABILITY)
    num_accepted = _leading(uniforms[:, :-1] < ratio, proposal)
    sequences = torch.arange(len(drafts), device=drafts.device)
    next_row = p_target[sequences, num_accepted]
    rejected = num_accepted < (num_drafts if proposal.lengths is None else proposal.lengths)
    residual = (next_row - p_draft[sequences, num_accepted.clamp_max(num_drafts - 1)]).clamp_min_(0)
    has_mass = rejected & (residual.sum(dim=-1) > SMALLEST_PROBABILITY)
    residual = torch.where(has_mass[:, None], residual, next_row)
    return Verdicts(num_accepted, draw_tokens(residual, uniforms[:, -1]))


def _of(drafts: Tensor, probabilities: Tensor) -> Tensor:
    """Probability of each draft: [B, n], [B, n, V] → [B, n]."""
    return probabilities.gather(2, drafts[..., None])[..., 0]


def _leading(stays: Tensor, proposal: Proposal) -> Tensor:
    """How many proposed drafts stay before the first that does not: [B, n] bool → [B]."""
    if proposal.lengths is not None:
        stays = stays & (torch.arange(stays.shape[1], device=stays.device) < proposal.lengths[:, None])
    return stays.long().cumprod(dim=1).sum(dim=1)
