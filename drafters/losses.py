"""Losses of the block drafters, written plainly (specs: "Loss"). Everything here is float32.

Rows are slots that count; other slots never reach the vocabulary. `fused_loss` computes the same in less memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from drafters.metrics import Reduce
from drafters.projection import soft_capped

WEIGHT_EPSILON = 1e-6
"""Added to the summed slot weights, so that a batch without supervision has loss 0."""


@dataclass(frozen=True)
class LossSettings:
    """Weights of the loss terms.

    Attributes:
        loss_decay_gamma: Slot k weighs exp(−k / this).
        ce_loss_alpha: Weight of the cross-entropy against the labels.
        l1_loss_alpha: Weight of the L1 distance to the target's distribution.
        confidence_head_alpha: Weight of the confidence loss.
    """

    loss_decay_gamma: float
    ce_loss_alpha: float
    l1_loss_alpha: float
    confidence_head_alpha: float


class RowLosses(NamedTuple):
    """Terms of each row, [N] float32.

    Attributes:
        cross_entropy: Against the label.
        l1: Σ_v |p_draft − p_target|.
        acceptance: 1 − l1 / 2 clamped to [0, 1], without gradient: how likely the target accepts a drafted token.
    """

    cross_entropy: Tensor
    l1: Tensor
    acceptance: Tensor


@dataclass(frozen=True)
class Vocabulary:
    """What makes logits of hidden states.

    Attributes:
        head: [V, D] of the target, frozen.
        markov: [V, r], W2 of the Markov head; None without it.
        softcap: c of c·tanh(logits / c), for draft and target alike; None leaves them as they are.
    """

    head: Tensor
    markov: Tensor | None = None
    softcap: float | None = None

    def draft_logits(self, hidden: Tensor, latent: Tensor | None) -> Tensor:
        """[N, D] and [N, r] → [N, V] float32. The Markov bias is not capped."""
        logits = soft_capped(functional.linear(hidden, self.head).float(), self.softcap)
        if self.markov is not None and latent is not None:
            logits = logits + functional.linear(latent, self.markov)
        return logits

    @torch.no_grad()
    def target_logits(self, states: Tensor) -> Tensor:
        """[N, D] rows of the target's last hidden state, of any floating dtype → [N, V] float32."""
        return soft_capped(functional.linear(states.to(self.head.dtype), self.head).float(), self.softcap)


@dataclass(frozen=True)
class RowInputs:
    """N rows of a loss.

    Attributes:
        hidden: [N, D] of the backbone.
        latent: [N, r] of the Markov head; None without it.
        labels: [N] int64.
        target_states: [N, D] rows of the target's last hidden state that predict the labels.
        ce_weights: [N] float32, what cross-entropy counts: slot weight · alpha / denominator.
        l1_weights: [N] float32, the same for L1.
    """

    hidden: Tensor
    latent: Tensor | None
    labels: Tensor
    target_states: Tensor
    ce_weights: Tensor
    l1_weights: Tensor


def plain_loss(rows: RowInputs, vocabulary: Vocabulary) -> tuple[Tensor, RowLosses]:
    """Weighted loss of rows, a scalar with gradient, and their terms [N] without: the reference of `fused_loss`."""
    terms = row_losses(
        vocabulary.draft_logits(rows.hidden, rows.latent), vocabulary.target_logits(rows.target_states), rows.labels
    )
    loss = (rows.ce_weights * terms.cross_entropy + rows.l1_weights * terms.l1).sum()
    return loss, RowLosses(*(term.detach() for term in terms))


def row_losses(draft_logits: Tensor, target_logits: Tensor, labels: Tensor) -> RowLosses:
    """Loss terms of rows of logits.

    Args:
        draft_logits: [N, V], any floating dtype.
        target_logits: [N, V], any floating dtype.
        labels: [N] int64.
    """
    draft_log_probabilities = functional.log_softmax(draft_logits.float(), dim=-1)
    target_probabilities = functional.softmax(target_logits.float(), dim=-1)
    l1 = (draft_log_probabilities.exp() - target_probabilities).abs().sum(-1)
    return RowLosses(
        cross_entropy=-draft_log_probabilities.gather(-1, labels[:, None]).squeeze(-1),
        l1=l1,
        acceptance=(1 - l1.detach() / 2).clamp(0, 1),
    )


def slot_weights(eval_mask: Tensor, sample_weights: Tensor, loss_decay_gamma: float) -> Tensor:
    """Weight of each slot: sample weight · eval_mask · exp(−k / γ_decay).

    Args:
        eval_mask: [B, A, γ] bool.
        sample_weights: [B] float32.
        loss_decay_gamma: γ_decay.

    Returns:
        [B, A, γ] float32.
    """
    slots = torch.arange(eval_mask.shape[-1], device=eval_mask.device, dtype=torch.float32)
    return eval_mask * torch.exp(-slots / loss_decay_gamma) * sample_weights[:, None, None]


def normalizer(weights: Tensor, reduce: Reduce) -> Tensor:
    """What every term's weighted sum is divided by: Σ w over all ranks + 1e-6."""
    return reduce(weights.sum().detach()[None])[0] + WEIGHT_EPSILON


def confidence_loss(logits: Tensor, acceptance: Tensor) -> Tensor:
    """Binary cross-entropy of confidence logits [N] against acceptance [N]: [N] float32."""
    return functional.binary_cross_entropy_with_logits(logits.float(), acceptance, reduction="none")
