"""Attention of the block-parallel backbone: blocks of γ queries over the context before them and over themselves.

All samples of a batch stand in one row: their context rows end to end, their blocks end to end. A block sees a span of
context rows, from where its sample begins to right before its anchor, and its own γ rows. On a GPU that is one call of
FlexAttention (`drafters.flex`). On a CPU blocks are taken in groups: a group's keys are the context rows that any of
its blocks sees, which ascending anchors keep close to what each sees; own blocks are small products by themselves,
joined with the context in one softmax. Backward computes the probabilities again, so scores of one group alone ever
exist.

Letters beside those of `drafters.batch`: M blocks, N context rows, H heads, K key heads, R = H / K, d head size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from torch.amp import custom_bwd, custom_fwd
from torch.autograd.function import once_differentiable
from torch.nn.attention.flex_attention import BlockMask

from drafters.batch import Span
from drafters.flex import attend_spans, span_masks, uses_flex
from drafters.key_values import KeyValues

GROUP_QUERIES = 64
"""Queries that a group has at most. More of them waste work on context that only the later anchors see, fewer on small
matrix products."""

LN_2 = math.log(2)


class BlockGroup(NamedTuple):
    """Blocks of one sample that are attended together.

    Attributes:
        first: First block.
        last: One past the last block.
        span: Context rows that any of them sees.
        bias: [blocks, 1, rows of the span] float32, −∞ where a block does not see a row, else 0; None if all see all.
    """

    first: int
    last: int
    span: Span
    bias: Tensor | None


@dataclass(frozen=True)
class BlockLayout:
    """Who sees what; built once a batch and shared by all layers.

    Attributes:
        block_size: γ.
        groups: All blocks in order, for a CPU.
        mask: The same for FlexAttention; None on a CPU.
    """

    block_size: int
    groups: tuple[BlockGroup, ...] = ()
    mask: BlockMask | None = None

    @classmethod
    def of_spans(cls, spans: Sequence[Span], num_context: int, block_size: int, device: torch.device) -> Self:
        """One span a block. Blocks of a sample have the same start, stand together, and their ends ascend."""
        if uses_flex(device):
            rows = torch.tensor(spans, dtype=torch.int32).reshape(-1, 2)
            [mask] = span_masks(rows, num_context, block_size, copies=(1,), device=device)
            return cls(block_size, mask=mask)
        return cls(block_size, tuple(_groups(spans, block_size)))


def attend_blocks(queries: Tensor, context: KeyValues, block: KeyValues, layout: BlockLayout, scale: float) -> Tensor:
    """Softmax attention of all blocks.

    Args:
        queries: [1, H, M·γ, d], rotated.
        context: N rows.
        block: M·γ rows.
        layout: Who sees what.
        scale: Multiplies the scores.

    Returns:
        [1, H, M·γ, d].
    """
    if layout.mask is not None:
        return attend_spans(queries, (context, block), layout.mask, scale)
    output: Tensor = _BlockAttention.apply(queries, *context, *block, layout, scale)
    return output


def _groups(spans: Sequence[Span], block_size: int) -> Iterator[BlockGroup]:
    most = max(1, GROUP_QUERIES // block_size)
    first = 0
    while first < len(spans):
        start, last = spans[first].start, first + 1
        while last < len(spans) and last - first < most and spans[last].start == start:
            last += 1
        ends = torch.tensor([span.end for span in spans[first:last]])
        furthest = max(start, int(ends.max()))
        hidden = torch.arange(start, furthest) >= ends[:, None]
        bias = torch.zeros(hidden.shape).masked_fill_(hidden, float("-inf"))[:, None] if hidden.any() else None
        yield BlockGroup(first, last, Span(start, furthest), bias)
        first = last


class _BlockAttention(torch.autograd.Function):
    """Attention group by group, in float32, under autocast too.

    Queries of a block stand together, those of its R heads a key head too.

    Scores are taken to the base 2: on CPUs torch computes exp2 several times faster than exp.
    """

    @staticmethod
    @custom_fwd(device_type="cpu", cast_inputs=torch.float32)
    def forward(
        ctx: Any,
        queries: Tensor,
        context_keys: Tensor,
        context_values: Tensor,
        own_keys: Tensor,
        own_values: Tensor,
        layout: BlockLayout,
        scale: float,
    ) -> Tensor:
        size, num_key_heads = layout.block_size, own_keys.shape[1]
        stacked = _stack(queries, num_key_heads, size) * (scale / LN_2)
        rows = _Rows(
            context_keys[0].float(),
            context_values[0].float(),
            _by_block(own_keys, size),
            _by_block(own_values, size),
        )
        own = stacked @ rows.own_keys.transpose(2, 3)
        output = torch.empty_like(stacked)
        log_sums = torch.empty_like(stacked[..., :1])
        for group in layout.groups:
            members = slice(group.first, group.last)
            weights = torch.cat([_context_scores(stacked, rows, group), own[:, members]], dim=3)
            highest = weights.amax(3, keepdim=True)
            weights.sub_(highest).exp2_()
            sums = weights.sum(3, keepdim=True)
            seen = weights[..., :-size].flatten(1, 2) @ rows.values_of(group)
            torch.div(seen.view_as(output[:, members]), sums, out=output[:, members])
            torch.div(weights[..., -size:], sums, out=own[:, members])
            torch.add(highest, sums.log2_(), out=log_sums[:, members])
        output += own @ rows.own_values
        ctx.save_for_backward(stacked, *rows, output, log_sums)
        ctx.layout, ctx.scale, ctx.dtype = layout, scale, queries.dtype
        return _unstack(output, size, queries.dtype)

    @staticmethod
    @custom_bwd(device_type="cpu")
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        stacked, *tensors, output, log_sums = ctx.saved_tensors
        rows, layout = _Rows(*tensors), ctx.layout
        grad = _stack(grad_output, len(rows.context_keys), layout.block_size)
        inner = (grad * output).sum(3, keepdim=True)

        weights = (stacked @ rows.own_keys.transpose(2, 3)).sub_(log_sums).exp2_()
        by_scores = (grad @ rows.own_values.transpose(2, 3)).sub_(inner).mul_(weights)
        by_queries = by_scores @ rows.own_keys
        by_own_keys, by_own_values = by_scores.transpose(2, 3) @ stacked, weights.transpose(2, 3) @ grad
        by_keys, by_values = torch.zeros_like(rows.context_keys), torch.zeros_like(rows.context_values)
        for group in layout.groups:
            members, seen = slice(group.first, group.last), slice(*group.span)
            weights = _context_scores(stacked, rows, group).sub_(log_sums[:, members]).exp2_().flatten(1, 2)
            group_grad = grad[:, members].flatten(1, 2)
            by_scores = (group_grad @ rows.values_of(group).transpose(1, 2)).sub_(inner[:, members].flatten(1, 2))
            by_scores.mul_(weights)
            by_values[:, seen].baddbmm_(weights.transpose(1, 2), group_grad)
            by_keys[:, seen].baddbmm_(by_scores.transpose(1, 2), stacked[:, members].flatten(1, 2))
            by_queries[:, members] += (by_scores @ rows.keys_of(group)).view_as(by_queries[:, members])

        for by_rows in (by_keys, by_own_keys):
            by_rows.mul_(LN_2)  # of `stacked`
        return (
            _unstack(by_queries.mul_(ctx.scale), layout.block_size, ctx.dtype),
            *(by_rows[None].to(ctx.dtype) for by_rows in (by_keys, by_values)),
            *(by_rows.flatten(1, 2)[None].to(ctx.dtype) for by_rows in (by_own_keys, by_own_values)),
            None,
            None,
        )


class _Rows(NamedTuple):
    """Keys and values in float32: of the context [K, N, d], of blocks [K, M, γ, d]."""

    context_keys: Tensor
    context_values: Tensor
    own_keys: Tensor
    own_values: Tensor

    def keys_of(self, group: BlockGroup) -> Tensor:
        """Context keys that a group sees."""
        return self.context_keys[:, group.span.start : group.span.end]

    def values_of(self, group: BlockGroup) -> Tensor:
        """Context values that a group sees."""
        return self.context_values[:, group.span.start : group.span.end]


def _context_scores(stacked: Tensor, rows: _Rows, group: BlockGroup) -> Tensor:
    """Scores of a group's queries against its context, −∞ where it does not see: [K, blocks, R·γ, rows of the span]."""
    members = stacked[:, group.first : group.last]
    scores = (members.flatten(1, 2) @ rows.keys_of(group).transpose(1, 2)).view(*members.shape[:3], -1)
    return scores if group.bias is None else scores.add_(group.bias)


def _stack(queries: Tensor, num_key_heads: int, block_size: int) -> Tensor:
    """[1, H, M·γ, d] → [K, M, R·γ, d] float32."""
    split = queries[0].float().unflatten(0, (num_key_heads, -1)).unflatten(2, (-1, block_size))
    return split.transpose(1, 2).flatten(2, 3)


def _unstack(stacked: Tensor, block_size: int, dtype: torch.dtype) -> Tensor:
    """[K, M, R·γ, d] → [1, H, M·γ, d]."""
    return stacked.unflatten(2, (-1, block_size)).transpose(1, 2).flatten(2, 3).flatten(0, 1)[None].to(dtype)


def _by_block(rows: Tensor, block_size: int) -> Tensor:
    """[1, K, M·γ, d] → [K, M, γ, d] float32."""
    return rows[0].float().unflatten(1, (-1, block_size))
