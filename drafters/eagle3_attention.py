"""Attention of Eagle3's training-time test: causal over the keys of step 0, and one key of each later step.

At step i the query at position p sees step 0's keys at positions 0…p and, of each step 1…i, only the key at p itself
(specs: "Training-time test"). `attend_plainly` says just that with one mask over all keys. `attend_steps` computes the
same as two pieces that share one softmax: causal attention with its log-sum-exp, block of queries by block of queries,
and a single score for each later step. No scores or probabilities outlive their block, forward or backward.

`StepKeys` attends samples that stand end to end in one row: on a GPU all at once, in one call of FlexAttention a step
(`drafters.flex`); elsewhere one sample after another through `attend_steps`.

Letters: B batch, H query heads, K key heads, G = H / K, T positions of step 0, R ≤ T queries, at the last R of these,
d head size, C queries of a block, E positions up to its end.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention.flex_attention import BlockMask

from drafters.batch import Span
from drafters.flex import attend_spans, span_masks, uses_flex
from drafters.key_values import KeyValues

BLOCK_QUERIES = 64
"""Queries of a block: its scores over 4096 keys are 1 MB a head. Keys after its last query are left out."""


@dataclass(frozen=True)
class StepLayout:
    """Who sees what at each step; built once a batch and shared by all layers.

    Rows that are attended together are a group: one sample, or with FlexAttention all of them.

    Attributes:
        num_keys: Step 0's keys of each group.
        num_queries: Queries of each group, which are also its keys of each later step.
        masks: For FlexAttention, one a step; None where groups are samples.
    """

    num_keys: tuple[int, ...]
    num_queries: tuple[int, ...]
    masks: tuple[BlockMask, ...] | None = None

    @classmethod
    def of_spans(cls, spans: Sequence[Span], num_steps: int, device: torch.device) -> Self:
        """One span a sample: positions that have queries. Step 0 has keys from position 0 to the span's end."""
        num_keys = tuple(span.end for span in spans)
        num_queries = tuple(span.end - span.start for span in spans)
        if not uses_flex(device):
            return cls(num_keys, num_queries)
        total_keys, total_queries = sum(num_keys), sum(num_queries)
        masks = span_masks(_seen_at_step_0(spans), total_keys, 1, copies=range(num_steps), device=device)
        return cls((total_keys,), (total_queries,), tuple(masks))


class StepKeys:
    """Keys and values of one layer, and what its queries make of them, step by step."""

    def __init__(self, layout: StepLayout) -> None:
        self._layout = layout
        self._steps: list[list[KeyValues]] = []

    def append(self, rows: KeyValues) -> None:
        """Add the next step's rows, [1, K, rows, d]: those of all keys at step 0, later those of the queries."""
        lengths = list(self._layout.num_queries if self._steps else self._layout.num_keys)
        groups = zip(*(each.split(lengths, dim=2) for each in rows), strict=True)
        self._steps.append([KeyValues(*group) for group in groups])

    def attend(self, queries: Tensor, scale: float) -> Tensor:
        """Softmax attention at the newest step.

        Args:
            queries: [1, H, rows, d], rotated.
            scale: Multiplies the scores.

        Returns:
            [1, H, rows, d].
        """
        if self._layout.masks is not None:
            return attend_spans(
                queries, [rows for [rows] in self._steps], self._layout.masks[len(self._steps) - 1], scale
            )
        groups = zip(queries.split(list(self._layout.num_queries), dim=2), zip(*self._steps, strict=True), strict=True)
        attended = [attend_steps(own, first, later, scale) for own, (first, *later) in groups if own.shape[2]]
        return torch.cat(attended, dim=2)


def attend_steps(queries: Tensor, first: KeyValues, later: Sequence[KeyValues], scale: float) -> Tensor:
    """Softmax attention at step i.

    Args:
        queries: [B, H, R, d], rotated.
        first: Step 0's keys and values, [B, K, T, d] each.
        later: Those of steps 1…i at the queries' positions, [B, K, R, d] each; none at step 0.
        scale: Multiplies the scores.

    Returns:
        [B, H, R, d].
    """
    grouped = queries.unflatten(1, (first.keys.shape[1], -1))
    attended, normalizer = _CausalAttention.apply(grouped, *first, scale)
    if later:
        # One softmax over both pieces: the causal one weighs the sum of its exponentials.
        scores = [(grouped * step.keys[:, :, None]).sum(-1, dtype=torch.float32) * scale for step in later]
        weights = torch.softmax(torch.stack([normalizer, *scores], dim=-1), dim=-1).to(queries.dtype)[..., None]
        attended = attended * weights[..., 0, :]
        for index, step in enumerate(later, start=1):
            attended = attended + step.values[:, :, None] * weights[..., index, :]
    return attended.flatten(1, 2)


def attend_plainly(queries: Tensor, first: KeyValues, later: Sequence[KeyValues], scale: float) -> Tensor:
    """What `attend_steps` computes, with all keys side by side under one mask: the readable reference."""
    num_heads, num_queries = queries.shape[1:3]
    length = first.keys.shape[2]
    keys, values = (torch.cat(rows, dim=2) for rows in zip(first, *later, strict=True))
    own = torch.eye(num_queries, dtype=torch.bool, device=queries.device)
    causal = own.new_ones(num_queries, length).tril(length - num_queries)
    seen = torch.cat([causal, *[own for _ in later]], dim=1)
    keys, values = (rows.repeat_interleave(num_heads // rows.shape[1], dim=1) for rows in (keys, values))
    scores = (queries @ keys.transpose(-1, -2)).float() * scale
    return torch.softmax(scores.masked_fill(~seen, -torch.inf), dim=-1).to(queries.dtype) @ values


def _seen_at_step_0(spans: Sequence[Span]) -> Tensor:
    """Step 0's packed keys that each query sees: the first, and one past the last, its own. [rows, 2] int32."""
    num_keys = torch.tensor([span.end for span in spans])
    num_queries = torch.tensor([span.end - span.start for span in spans])
    starts = (num_keys.cumsum(0) - num_keys).repeat_interleave(num_queries)
    places = torch.cat([torch.arange(*span) for span in spans])
    return torch.stack([starts, starts + places + 1], dim=1).int()


class _CausalAttention(torch.autograd.Function):
    """Causal attention and its log-sum-exp, both differentiable.

    Backward computes each block's probabilities P again from the log-sum-exp. With O the output,
    ∂S = P ⊙ (∂O·Vᵀ − rowsum(∂O ⊙ O) + ∂logsumexp).
    """

    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Queries [B, K, G, R, d], keys and values [B, K, T, d] → [B, K, G, R, d], [B, K, G, R] float32."""
        output = torch.empty_like(queries)
        normalizer = queries.new_empty(queries.shape[:-1], dtype=torch.float32)
        for rows, seen in _blocks(queries, keys):
            scores = _block_scores(queries[:, :, :, rows], keys[:, :, seen], scale)
            normalizer[..., rows] = scores.logsumexp(-1)
            probabilities = scores.sub_(normalizer[..., rows, None]).exp_()
            output[:, :, :, rows] = _per_key_head(probabilities.to(values.dtype), values[:, :, seen])
        ctx.save_for_backward(queries, keys, values, output, normalizer)
        ctx.scale = scale
        return output, normalizer

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor, grad_normalizer: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        queries, keys, values, output, normalizer = ctx.saved_tensors
        by_queries = torch.empty_like(queries)
        # Sums over blocks, so in float32 whatever the rows are in.
        by_keys = torch.zeros_like(keys, dtype=torch.float32)
        by_values = torch.zeros_like(values, dtype=torch.float32)
        offset = grad_normalizer - (grad_output * output).sum(-1, dtype=torch.float32)
        for rows, seen in _blocks(queries, keys):
            block, grad_block = queries[:, :, :, rows], grad_output[:, :, :, rows]
            scores = _block_scores(block, keys[:, :, seen], ctx.scale)
            probabilities = scores.sub_(normalizer[..., rows, None]).exp_()
            by_values[:, :, seen] += _transposed(probabilities.to(values.dtype), grad_block)
            by_scores = _per_key_head(grad_block, values[:, :, seen].transpose(-1, -2)).float()
            by_scores = by_scores.add_(offset[..., rows, None]).mul_(probabilities).mul_(ctx.scale).to(block.dtype)
            by_queries[:, :, :, rows] = _per_key_head(by_scores, keys[:, :, seen])
            by_keys[:, :, seen] += _transposed(by_scores, block)
        return by_queries, by_keys.to(keys.dtype), by_values.to(values.dtype), None


def _blocks(queries: Tensor, keys: Tensor) -> Iterator[tuple[slice, slice]]:
    """Queries of each block, and the keys that any of them sees."""
    num_queries = queries.shape[3]
    before = keys.shape[2] - num_queries
    for start in range(0, num_queries, BLOCK_QUERIES):
        end = min(start + BLOCK_QUERIES, num_queries)
        yield slice(start, end), slice(before + end)


def _block_scores(rows: Tensor, keys: Tensor, scale: float) -> Tensor:
    """Causal scores of the last C positions: [B, K, G, C, d], [B, K, E, d] → [B, K, G, C, E] float32."""
    scores = _per_key_head(rows, keys.transpose(-1, -2)).float().mul_(scale)
    count = rows.shape[3]
    future = torch.ones(count, count, dtype=torch.bool, device=rows.device).triu_(1)
    scores[..., -count:].masked_fill_(future, -torch.inf)
    return scores


def _per_key_head(rows: Tensor, matrix: Tensor) -> Tensor:
    """Rows of all query heads of a key head times its matrix: [B, K, G, C, m], [B, K, m, n] → [B, K, G, C, n]."""
    return (rows.flatten(2, 3) @ matrix).unflatten(2, rows.shape[2:4])


def _transposed(left: Tensor, right: Tensor) -> Tensor:
    """Σ over rows of all query heads of a key head: [B, K, G, C, m], [B, K, G, C, n] → [B, K, m, n]."""
    return left.flatten(2, 3).transpose(-1, -2) @ right.flatten(2, 3)
