"""The vocabulary's part of a block drafter's loss, fused: no [rows, V] tensor of all rows ever exists.

`losses.plain_loss` is the same in plain words. Here rows go through head, soft-cap, Markov bias, softmax and loss in
chunks, and each chunk leaves per-row scalars behind. What the loss weighs a row with depends on masks alone, so a
chunk's input gradients are formed right after its losses, from the probabilities that are still there: nothing is
computed twice, and backward only scales what forward kept.

With p the draft's and q the target's distribution of a row, z the draft's logits, s = sign(p − q):

    ∂CE/∂z = p − onehot(label)        ∂L1/∂z = p ⊙ (s − ⟨s, p⟩)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from drafters.losses import RowInputs, RowLosses, Vocabulary

CPU_CHUNK_BYTES = 8 * 1024**2
"""Bytes of one float32 [chunk, V] tensor on a CPU: four of them stay near its caches, and products of 64 rows with a
vocabulary of 32k are as fast as larger ones."""

GPU_CHUNK_BYTES = 512 * 1024**2
"""The same on a GPU: some 880 rows of a vocabulary of 152k, enough to fill it."""


def fused_loss(rows: RowInputs, vocabulary: Vocabulary) -> tuple[Tensor, RowLosses]:
    """Weighted loss of rows and its terms, with gradients for hidden states, latents and W2.

    Backward can run once: it hands out gradients that forward made. They are made before a loss scale is known, so none
    can lift what float16 rounds to zero: train in bf16 or float32, the precisions that a recipe has.

    Args:
        rows: N rows; those of weight 0 cost as much as others, so leave them out.
        vocabulary: Its head is frozen.

    Returns:
        Scalar float32 with gradient, Σ ce_weight·CE + l1_weight·L1; and the terms [N], without gradient.

    Raises:
        ValueError: The head is to be trained.
    """
    if vocabulary.head.requires_grad:
        raise ValueError("the fused loss has no gradient for the head: freeze it, or set drafter.loss to plain")
    inputs = (rows.hidden, rows.latent, vocabulary.markov)
    needs_gradient = tuple(torch.is_grad_enabled() and tensor is not None and tensor.requires_grad for tensor in inputs)
    loss, *terms = _FusedLoss.apply(*inputs, rows, vocabulary, needs_gradient)
    return loss, RowLosses(*terms)


def chunk_rows(vocab_size: int, device: torch.device) -> int:
    """Rows of a chunk."""
    num_bytes = GPU_CHUNK_BYTES if device.type == "cuda" else CPU_CHUNK_BYTES
    return max(1, num_bytes // (4 * vocab_size))


def float_logits(hidden: Tensor, vocabulary: Vocabulary) -> Tensor:
    """Float32 logits of a chunk without a Markov bias, capped in place: [C, D] → [C, V]."""
    logits = functional.linear(hidden.to(vocabulary.head.dtype), vocabulary.head).float()
    if vocabulary.softcap:
        logits.div_(vocabulary.softcap).tanh_().mul_(vocabulary.softcap)
    return logits


class _FusedLoss(torch.autograd.Function):
    """Takes hidden, latent and W2 by themselves too, so that autograd sees them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        latent: Tensor | None,
        markov: Tensor | None,
        rows: RowInputs,
        vocabulary: Vocabulary,
        needs_gradient: tuple[bool, bool, bool],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        num_rows = len(hidden)
        terms = hidden.new_empty(3, num_rows, dtype=torch.float32)
        gradients = _Gradients(hidden, latent, markov, needs_gradient)
        size = chunk_rows(len(vocabulary.head), hidden.device)
        for start in range(0, num_rows, size):
            chunk = slice(start, min(start + size, num_rows))
            terms[:, chunk] = _chunk_losses(rows, vocabulary, chunk, gradients)
        cross_entropy, l1, acceptance = terms
        loss = (rows.ce_weights * cross_entropy + rows.l1_weights * l1).sum()
        ctx.gradients = gradients.finished()
        ctx.mark_non_differentiable(cross_entropy, l1, acceptance)
        ctx.set_materialize_grads(False)
        return loss, cross_entropy, l1, acceptance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("backward of the fused loss ran before: its gradients were handed out")
        if grad_loss is None:
            return (None,) * 6
        scaled = [gradient if gradient is None else gradient.mul_(grad_loss) for gradient in gradients]
        return (*scaled, None, None, None)


class _Gradients:
    """Gradients of the loss by hidden states [N, D], latents [N, r] and W2 [V, r], filled chunk by chunk."""

    def __init__(
        self, hidden: Tensor, latent: Tensor | None, markov: Tensor | None, needed: tuple[bool, bool, bool]
    ) -> None:
        self.hidden = torch.empty_like(hidden) if needed[0] else None
        self.latent = torch.empty_like(latent) if needed[1] and latent is not None else None
        # Summed over chunks, so in float32 whatever the weight is in.
        self.markov = torch.zeros_like(markov, dtype=torch.float32) if needed[2] and markov is not None else None
        self._markov_dtype = markov.dtype if markov is not None else torch.float32

    @property
    def any_needed(self) -> bool:
        """Whether any is to be formed at all."""
        return any(gradient is not None for gradient in (self.hidden, self.latent, self.markov))

    def write(
        self, chunk: slice, by_logits: Tensor, slope: Tensor | None, latent: Tensor | None, vocabulary: Vocabulary
    ) -> None:
        """Take the loss's gradient by a chunk's logits [C, V] float32, which is overwritten."""
        if vocabulary.markov is not None and latent is not None:
            by_bias = by_logits.to(vocabulary.markov.dtype)
            if self.latent is not None:
                torch.mm(by_bias, vocabulary.markov, out=self.latent[chunk])
            if self.markov is not None and by_bias.dtype == self.markov.dtype:
                self.markov.addmm_(by_bias.t(), latent)
            elif self.markov is not None:
                self.markov.add_(by_bias.t() @ latent)
        if self.hidden is not None:
            by_head = by_logits if slope is None else by_logits.mul_(slope)
            torch.mm(by_head.to(vocabulary.head.dtype), vocabulary.head, out=self.hidden[chunk])

    def finished(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """All three, in the dtypes of what they belong to."""
        markov = self.markov if self.markov is None else self.markov.to(self._markov_dtype)
        return self.hidden, self.latent, markov


def _chunk_losses(rows: RowInputs, vocabulary: Vocabulary, chunk: slice, gradients: _Gradients) -> Tensor:
    """CE, L1 and acceptance of a chunk, [3, C] float32; writes its part of the gradients.

    Each [C, V] tensor is overwritten by the next as soon as it has served.
    """
    labels = rows.labels[chunk, None]
    latent = None if rows.latent is None else rows.latent[chunk]
    logits, slope = _draft_logits(rows.hidden[chunk], latent, vocabulary, with_slope=gradients.hidden is not None)
    draft = torch.log_softmax(logits, dim=1)
    del logits
    cross_entropy = -draft.gather(1, labels)
    draft.exp_()

    target_logits = float_logits(rows.target_states[chunk], vocabulary)
    difference = torch.softmax(target_logits, dim=1).neg_().add_(draft)
    del target_logits
    l1 = difference.abs().sum(1, keepdim=True)

    if gradients.any_needed:
        ce_weights, l1_weights = rows.ce_weights[chunk, None], rows.l1_weights[chunk, None]
        sign = difference.sign_()
        constant = ce_weights - l1_weights * torch.einsum("cv,cv->c", sign, draft)[:, None]
        by_logits = sign.mul_(l1_weights).add_(constant).mul_(draft).scatter_add_(1, labels, -ce_weights)
        del draft
        gradients.write(chunk, by_logits, slope, latent, vocabulary)
    return torch.cat([cross_entropy, l1, (1 - l1 / 2).clamp_(0, 1)], dim=1).t()


def _draft_logits(
    hidden: Tensor, latent: Tensor | None, vocabulary: Vocabulary, *, with_slope: bool
) -> tuple[Tensor, Tensor | None]:
    """Float32 logits [C, V], and how they change with the head's: None where they are the same."""
    logits, slope = functional.linear(hidden, vocabulary.head).float(), None
    if vocabulary.softcap:
        logits.div_(vocabulary.softcap).tanh_()
        slope = 1 - logits.square() if with_slope else None
        logits.mul_(vocabulary.softcap)
    if vocabulary.markov is not None and latent is not None:
        if vocabulary.markov.dtype == torch.float32:
            logits.addmm_(latent, vocabulary.markov.t())
        else:
            logits.add_(functional.linear(latent, vocabulary.markov))
    return logits, slope
