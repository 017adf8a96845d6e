"""Metrics of a training step: sums and counts, reduced over ranks in one go, then divided (specs: "Metrics")."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Reduce = Callable[[Tensor], Tensor]
"""Sums a 1-D float32 tensor over ranks."""


def keep_local(values: Tensor) -> Tensor:
    """The reduction of a single process."""
    return values


class MetricSums:
    """Collects sums and counts of this rank's metrics."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._values: list[Tensor] = []

    def add(self, name: str, total: Tensor, count: Tensor | float) -> None:
        """Add a metric whose value is total / count, both summed over ranks. Both are scalars."""
        self._names.append(name)
        self._values += [total.detach().float(), torch.as_tensor(count, dtype=torch.float32, device=total.device)]

    def means(self, reduce: Reduce) -> dict[str, float]:
        """Reduce everything with one call and divide; a metric that nothing counted towards is 0."""
        totals = reduce(torch.stack(self._values)).tolist()
        pairs = zip(totals[0::2], totals[1::2], strict=True)
        return {name: total / count if count else 0.0 for name, (total, count) in zip(self._names, pairs, strict=True)}


def add_acceptance(metrics: MetricSums, acceptance: Tensor, eval_mask: Tensor, sample_weights: Tensor) -> None:
    """`accept_rate@k` and `tau_probabilistic` = mean over blocks of 1 + Σ_k Π_{i≤k} α_i.

    A sample's weight is its multiplicity, so a sample of weight 0 counts nowhere.

    Args:
        metrics: Where to.
        acceptance: [B, A, γ] float32, 0 where eval_mask is.
        eval_mask: [B, A, γ] bool.
        sample_weights: [B] float32.
    """
    weights = eval_mask * sample_weights[:, None, None]
    for slot in range(eval_mask.shape[-1]):
        weight = weights[..., slot]
        metrics.add(f"accept_rate@{slot}", (acceptance[..., slot] * weight).sum(), weight.sum())
    blocks = eval_mask.any(-1) * sample_weights[:, None]
    expected_length = 1 + acceptance.cumprod(-1).sum(-1)
    metrics.add("tau_probabilistic", (expected_length * blocks).sum(), blocks.sum())


@torch.no_grad()
def sample_rejections(acceptance: Tensor, samples: Tensor, num_samples: int) -> Tensor:
    """How much of what is drafted for each sample the target would reject: 1 − the mean acceptance of its rows.

    Args:
        acceptance: [N] in [0, 1].
        samples: [N] int64, the sample of each row.
        num_samples: B.

    Returns:
        [B] float32; NaN for a sample without rows.
    """
    totals, counts = acceptance.new_zeros(2, num_samples, dtype=torch.float32)
    totals.index_add_(0, samples, acceptance.float())
    counts.index_add_(0, samples, torch.ones_like(acceptance, dtype=torch.float32))
    return 1 - totals / counts


def add_confidence(metrics: MetricSums, confidence: Tensor, acceptance: Tensor, slot_weights: Tensor) -> None:
    """How far predicted acceptance is from acceptance, by slot and as survival of the prefix.

    Args:
        metrics: Where to.
        confidence: [B, A, γ] probabilities, 0 where eval_mask is.
        acceptance: [B, A, γ], 0 where eval_mask is.
        slot_weights: [B, A, γ] weights of the loss.
    """
    count = slot_weights.sum()
    error = confidence - acceptance
    survival_error = confidence.cumprod(-1) - acceptance.cumprod(-1)
    metrics.add("confidence_abs_error", (error.abs() * slot_weights).sum(), count)
    metrics.add("confidence_bias", (error * slot_weights).sum(), count)
    metrics.add("confidence_cumprod_bias", (survival_error * slot_weights).sum(), count)


def add_coverage(
    metrics: MetricSums,
    num_candidates: Tensor,
    num_tokens: Tensor,
    keep: Tensor,
    eval_mask: Tensor,
    sample_weights: Tensor,
    num_anchors: int,
) -> None:
    """How many positions could be anchors, were drawn, and how many slots of a drawn block are supervised.

    Args:
        metrics: Where to.
        num_candidates: [B] positions of each sample that could be anchors.
        num_tokens: [B] positions of each sample, its padding counted.
        keep: [B, A] bool.
        eval_mask: [B, A, γ] bool.
        sample_weights: [B] float32.
        num_anchors: Most anchors of a sample.
    """
    num_samples = sample_weights.sum()
    num_candidates = (num_candidates * sample_weights).sum()
    num_drawn = (keep.sum(-1) * sample_weights).sum()
    num_supervised = (eval_mask.sum((-1, -2)) * sample_weights).sum()
    block_size = eval_mask.shape[-1]
    metrics.add("valid_anchors_abs", num_candidates, num_samples)
    metrics.add("valid_anchors_ratio", num_candidates, (num_tokens * sample_weights).sum())
    metrics.add("sampled_anchors_abs", num_drawn, num_samples)
    metrics.add("sampled_anchors_ratio", num_drawn, num_samples * num_anchors)
    metrics.add("block_supervised_tokens_abs", num_supervised, num_drawn)
    metrics.add("block_supervised_tokens_ratio", num_supervised, num_drawn * block_size)
