"""Attention of the block-parallel backbone: blocks of γ queries over a shared context and their own block.

Blocks are attended in groups. A group's keys are the context rows before its last anchor, and its own blocks: since
anchors ascend, that is half of all context rows on average, and no [A·γ, T + A·γ] mask ever exists.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor
from torch.nn import functional

from drafters.anchors import Anchors

GROUP_QUERIES = 64
"""Queries attended together. More of them waste work on other blocks' keys, fewer on small matrix products; measured
on a CPU at T 512 and 48 anchors, 28 to 112 are equally fast and everything beyond is slower."""


class KeyValues(NamedTuple):
    """Keys and values of one layer, each [B, key heads, rows, head size]; keys are rotated already."""

    keys: Tensor
    values: Tensor


class Rope(NamedTuple):
    """Cosine and sine of rotary positions, each [B, rows, head size]."""

    cos: Tensor
    sin: Tensor


class BlockGroup(NamedTuple):
    """Blocks attended together.

    Attributes:
        start: First query.
        end: One past the last query.
        num_context: Context rows that any block of the group sees.
        mask: [B, 1, end − start, num_context + end − start] bool, or None if every query sees every key.
    """

    start: int
    end: int
    num_context: int
    mask: Tensor | None


@dataclass(frozen=True)
class BlockLayout:
    """Who sees what; built once a batch and shared by all layers.

    Attributes:
        groups: All blocks, in order.
        alive: [B, 1, A·γ, 1] bool, false for queries of dummy blocks; None if there is no dummy.
    """

    groups: tuple[BlockGroup, ...]
    alive: Tensor | None = None

    @classmethod
    def of_anchors(cls, anchors: Anchors, block_size: int, device: torch.device) -> Self:
        """A block sees context positions strictly before its anchor, and all of its own block."""
        positions, keep = anchors.positions.cpu(), anchors.keep.cpu()
        alive = None
        if not keep.all():
            alive = keep.repeat_interleave(block_size, dim=1)[:, None, :, None].to(device)
        return cls(tuple(_groups(positions, block_size, device)), alive)

    @classmethod
    def of_one_block(cls, num_context: int, block_size: int) -> Self:
        """One block that sees the whole context: drafting."""
        return cls((BlockGroup(0, block_size, num_context, None),))


def _groups(positions: Tensor, block_size: int, device: torch.device) -> Iterator[BlockGroup]:
    batch, num_anchors = positions.shape
    step = max(1, GROUP_QUERIES // block_size)
    for first in range(0, num_anchors, step):
        members = positions[:, first : first + step]
        count = members.shape[1]
        num_context = int(members.max())
        queries = members.repeat_interleave(block_size, dim=1).to(device)
        context = torch.arange(num_context, device=device) < queries[:, :, None]
        block = torch.arange(count, device=device).repeat_interleave(block_size)
        own = (block[:, None] == block).expand(batch, -1, -1)
        mask = torch.cat([context, own], dim=2)[:, None]
        yield BlockGroup(first * block_size, (first + count) * block_size, num_context, mask)


def attend_blocks(queries: Tensor, context: KeyValues, block: KeyValues, layout: BlockLayout, scale: float) -> Tensor:
    """Softmax attention of all blocks.

    Args:
        queries: [B, heads, A·γ, head size], rotated.
        context: T rows.
        block: A·γ rows.
        layout: Who sees what.
        scale: Multiplies the scores.

    Returns:
        [B, heads, A·γ, head size]; zero for queries of dummy blocks.
    """
    grouped = queries.shape[1] != block.keys.shape[1]
    outputs = []
    for start, end, num_context, mask in layout.groups:
        keys = torch.cat([context.keys[:, :, :num_context], block.keys[:, :, start:end]], dim=2)
        values = torch.cat([context.values[:, :, :num_context], block.values[:, :, start:end]], dim=2)
        outputs.append(
            functional.scaled_dot_product_attention(
                queries[:, :, start:end], keys, values, attn_mask=mask, scale=scale, enable_gqa=grouped
            )
        )
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)
    return output if layout.alive is None else output * layout.alive
