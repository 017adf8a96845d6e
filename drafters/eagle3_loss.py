"""Eagle3's soft cross-entropy over all steps of the training-time test (specs: "Eagle3", "Loss").

A row is one supervised position at one step: what the drafter makes of it is scored against the target's distribution
at a row of the target's last hidden state. `plain_soft_losses` is the readable form, on logits of all rows.
`fused_soft_loss` never holds them: it takes the target's rows in chunks, rebuilds their probabilities from hidden
states once for all steps that are scored against them, and forms each chunk's gradients right after its losses, from
the probabilities that are still there. What a row weighs depends on masks alone, so backward only scales what forward
kept. With p the draft's distribution, q the target's and z the draft's logits, ∂CE/∂z = p − q, and the same difference
gives the acceptance 1 − Σ|p − q| / 2.

Where only a part of the vocabulary is drafted, the target's distribution is renormalised over that part, and rows whose
preferred token lies outside weigh nothing (the EAGLE-3 reference does both). Acceptance and agreement are those of
decoding: against the whole distribution, of which the draft leaves the other tokens at 0.

Letters: N target rows, N_i rows of step i, V vocabulary, D hidden size, C rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from drafters.fused_loss import chunk_rows, float_logits
from drafters.losses import Vocabulary

CHUNKS = 2
"""Rows of a chunk, in chunks of the block drafters' loss: half as many [C, V] tensors live at once here, and fewer,
longer products read the head less often."""


class SoftLosses(NamedTuple):
    """Terms of each row, [N_i] float32; acceptance and agreement are without gradient.

    Attributes:
        cross_entropy: −Σ_v q_v · log p_v against the target's distribution.
        acceptance: 1 − Σ_v |p_v − q_v| / 2, clamped to [0, 1].
        agreement: 1 where draft and target prefer the same token.
    """

    cross_entropy: Tensor
    acceptance: Tensor
    agreement: Tensor


class Cut(NamedTuple):
    """The part of the vocabulary that the drafter drafts, Vd tokens.

    Attributes:
        tokens: [Vd] int64, ascending: the target's ids of these.
        head: [Vd, D], their rows of the head.
    """

    tokens: Tensor
    head: Tensor


class StepRows(NamedTuple):
    """The rows of one step.

    Attributes:
        hidden: [N_i, D] normed output of the drafter.
        targets: [N_i] int64, ascending: which of the N target rows each is scored against.
        weights: [N_i] float32 in the loss.
    """

    hidden: Tensor
    targets: Tensor
    weights: Tensor


def plain_soft_losses(draft_logits: Tensor, target_logits: Tensor, kept: Tensor | None = None) -> SoftLosses:
    """Terms of rows of logits, any floating dtype: the draft's [N, V], or [N, Vd] where only these tokens are kept."""
    draft = functional.log_softmax(draft_logits.float(), dim=-1)
    if kept is not None:
        return _plain_cut_losses(draft, target_logits.float(), kept)
    target = functional.softmax(target_logits.float(), dim=-1)
    distance = (draft.detach().exp() - target).abs().sum(-1)
    return SoftLosses(
        cross_entropy=-(target * draft).sum(-1),
        acceptance=(1 - distance / 2).clamp(0, 1),
        agreement=(draft_logits.argmax(-1) == target_logits.argmax(-1)).float(),
    )


def _plain_cut_losses(draft: Tensor, target_logits: Tensor, kept: Tensor) -> SoftLosses:
    choices = target_logits.argmax(-1)
    cross_entropy = -(functional.softmax(target_logits[:, kept], dim=-1) * draft).sum(-1)
    whole = functional.softmax(target_logits, dim=-1)[:, kept]
    distance = (draft.detach().exp() - whole).abs().sum(-1) + 1 - whole.sum(-1)
    return SoftLosses(
        cross_entropy=cross_entropy * torch.isin(choices, kept),
        acceptance=(1 - distance / 2).clamp(0, 1),
        agreement=(kept[draft.argmax(-1)] == choices).float(),
    )


def plain_soft_loss(
    steps: Sequence[StepRows], target_states: Tensor, vocabulary: Vocabulary, cut: Cut | None = None
) -> tuple[Tensor, list[SoftLosses]]:
    """Weighted loss of all steps, with gradient, and its terms: the reference of `fused_soft_loss`."""
    target_logits = vocabulary.target_logits(target_states)
    drafted, kept = (vocabulary, None) if cut is None else (replace(vocabulary, head=cut.head), cut.tokens)
    terms = [
        plain_soft_losses(drafted.draft_logits(step.hidden, None), target_logits[step.targets], kept) for step in steps
    ]
    loss = sum(torch.dot(step.weights, each.cross_entropy) for step, each in zip(steps, terms, strict=True))
    return torch.as_tensor(loss), terms


def fused_soft_loss(
    steps: Sequence[StepRows], target_states: Tensor, vocabulary: Vocabulary, cut: Cut | None = None
) -> tuple[Tensor, list[SoftLosses]]:
    """Weighted loss of all steps and its terms, with gradients for the steps' hidden states.

    Backward can run once: it hands out gradients that forward made. They are made before a loss scale is known, so none
    can lift what float16 rounds to zero: train in bf16 or float32, the precisions that a recipe has.

    Args:
        steps: Rows of each step; rows of weight 0 cost as much as others, so leave them out.
        target_states: [N, D] rows of the target's last hidden state.
        vocabulary: The target's. Its head is frozen; Eagle3 has no Markov head.
        cut: What of it is drafted; None for all.

    Returns:
        Scalar float32 with gradient, Σ weight · cross-entropy; and the terms of each step, without gradient.

    Raises:
        ValueError: The head is to be trained.
    """
    if vocabulary.head.requires_grad:
        raise ValueError("the fused soft cross-entropy has no gradient for the head: freeze it")
    loss, terms = _FusedSoftLoss.apply(
        steps, target_states, vocabulary, cut, torch.is_grad_enabled(), *(s.hidden for s in steps)
    )
    by_step = terms.split([len(step.hidden) for step in steps], dim=1)
    return loss, [SoftLosses(*step_terms) for step_terms in by_step]


class _FusedSoftLoss(torch.autograd.Function):
    """Takes the hidden states by themselves too, so that autograd sees them."""

    @staticmethod
    def forward(
        ctx: Any,
        steps: Sequence[StepRows],
        target_states: Tensor,
        vocabulary: Vocabulary,
        cut: Cut | None,
        with_gradients: bool,
        *hidden: Tensor,
    ) -> tuple[Tensor, Tensor]:
        size = CHUNKS * chunk_rows(len(vocabulary.head), vocabulary.head.device)
        gradients = [
            torch.empty_like(rows) if with_gradients and needed else None
            for rows, needed in zip(hidden, ctx.needs_input_grad[5:], strict=True)
        ]
        terms = [rows.new_empty(3, len(rows), dtype=torch.float32) for rows in hidden]
        drafted = vocabulary if cut is None else replace(vocabulary, head=cut.head)
        starts = range(0, len(target_states), size)
        edges = torch.tensor([*starts, len(target_states)], device=target_states.device)
        bounds = torch.stack([torch.searchsorted(step.targets, edges) for step in steps]).tolist()
        for index, start in enumerate(starts):
            target_logits = float_logits(target_states[start : start + size], vocabulary)
            target = _TargetRows.of_logits(target_logits, cut)
            del target_logits
            for number, step in enumerate(steps):
                rows = slice(bounds[number][index], bounds[number][index + 1])
                members = step.targets[rows] - start
                terms[number][:, rows] = _chunk_terms(
                    step, rows, drafted, target.select(members), by_hidden=gradients[number]
                )
        all_terms = torch.cat(terms, dim=1)
        weights = torch.cat([step.weights for step in steps])
        ctx.gradients = gradients
        ctx.mark_non_differentiable(all_terms)
        ctx.set_materialize_grads(False)
        return torch.dot(weights, all_terms[0]), all_terms

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("backward of the fused soft cross-entropy ran before: its gradients were handed out")
        if grad_loss is None:
            return (None,) * (5 + len(gradients))
        return (None, None, None, None, None, *(rows if rows is None else rows.mul_(grad_loss) for rows in gradients))


class _TargetRows(NamedTuple):
    """What C rows of the target are scored with.

    Attributes:
        distribution: [C, V], or [C, Vd] over the kept tokens alone.
        choices: [C] int64, its preferred token among these; −1 where that one is not kept.
        mass: [C], what the target gives the kept tokens together; None where all are.
    """

    distribution: Tensor
    choices: Tensor
    mass: Tensor | None

    @classmethod
    def of_logits(cls, logits: Tensor, cut: Cut | None) -> Self:
        """Of the target's logits [C, V] float32."""
        choices = logits.argmax(1)
        if cut is None:
            return cls(torch.softmax(logits, dim=1), choices, None)
        kept = logits[:, cut.tokens]
        places = torch.searchsorted(cut.tokens, choices).clamp_max_(len(cut.tokens) - 1)
        choices = torch.where(cut.tokens[places] == choices, places, -1)
        return cls(torch.softmax(kept, dim=1), choices, (kept.logsumexp(1) - logits.logsumexp(1)).exp_())

    def select(self, members: Tensor) -> _TargetRows:
        """Some rows; these themselves where it is all of them."""
        if len(members) == len(self.choices):
            return self
        return _TargetRows(
            self.distribution[members], self.choices[members], None if self.mass is None else self.mass[members]
        )


def _chunk_terms(
    step: StepRows, rows: slice, drafted: Vocabulary, target: _TargetRows, *, by_hidden: Tensor | None
) -> Tensor:
    """Terms of some rows of a step, [3, C]; writes their part of the gradient.

    Two [C, V] tensors are all there is, a third with a soft-cap or a cut: the draft's is overwritten step by step.
    """
    logits = float_logits(step.hidden[rows], drafted)
    weights = step.weights[rows]
    top, choice = logits.max(dim=1, keepdim=True)
    expected = torch.einsum("cv,cv->c", target.distribution, logits)
    slope = 1 - (logits / drafted.softcap).square_() if drafted.softcap and by_hidden is not None else None
    draft = logits.sub_(top).exp_()
    total = draft.sum(dim=1, keepdim=True)
    cross_entropy = (top + total.log()).squeeze(1) - expected
    draft.div_(total)
    if target.mass is None:
        difference = draft.sub_(target.distribution)
        distance = torch.linalg.vector_norm(difference, ord=1, dim=1)
    else:
        # What is accepted is measured against the whole vocabulary, what is learned against the kept part of it.
        apart = torch.addcmul(draft, target.distribution, target.mass[:, None], value=-1)
        distance = torch.linalg.vector_norm(apart, ord=1, dim=1) + 1 - target.mass
        is_kept = target.choices >= 0
        cross_entropy, weights = cross_entropy * is_kept, weights * is_kept
        difference = draft.sub_(target.distribution)
    acceptance = (1 - distance / 2).clamp_(0, 1)
    if by_hidden is not None:
        by_logits = difference.mul_(weights[:, None])
        if slope is not None:
            by_logits.mul_(slope)
        torch.mm(by_logits.to(drafted.head.dtype), drafted.head, out=by_hidden[rows])
    return torch.stack([cross_entropy, acceptance, choice.squeeze(1) == target.choices])
