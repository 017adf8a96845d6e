"""FlexAttention of packed rows: on a GPU, one call computes what a mask lets queries see and skips all other tiles.

Both kinds of drafters ask the same of it. Queries stand in blocks. Keys are context rows, of which a block sees one
span, then copies of rows that belong to the queries one by one, of which a block sees its own rows in every copy:

- Blocks of DSpark and DFlash see the context before their anchor and one copy, their own γ rows.
- In Eagle3's training-time test a block is one position. Its span of step 0's keys ends with its own; every later step
  adds a copy.

Letters: M blocks of γ queries, Q = M·γ, N context rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from drafters.key_values import KeyValues

TILE = 128
"""Queries and keys of a FlexAttention tile."""


MOST_KERNELS = 64
"""Variants compiled at most. One serves all lengths, but a single tile, a single sample or no gradient takes another: a
handful, which torch's own 8 may not hold. Past the limit torch would go on with all scores in memory."""


def uses_flex(device: torch.device) -> bool:
    """Whether FlexAttention has a kernel, forward and backward, on a device: a GPU."""
    return device.type == "cuda"


def span_masks(
    spans: Tensor, num_context: int, block_size: int, *, copies: Sequence[int], device: torch.device
) -> list[BlockMask]:
    """Masks that differ in how many copies of the queries' own rows follow the context.

    Which tiles hold anything to see follows from the spans, so no mask of single queries and keys is ever built; and
    the tiles of more copies are those of fewer and some more.

    Args:
        spans: [M, 2] int32 on the CPU, the first context row that each block sees, and one past the last.
        num_context: N.
        block_size: γ.
        copies: Of each mask, ascending.
        device: Of the queries.
    """
    num_queries = len(spans) * block_size
    by_query = spans.repeat_interleave(block_size, dim=0)
    tiles = torch.arange(0, num_queries, TILE)[:, None] + torch.arange(TILE)
    filled = tiles[:, -1:] < num_queries
    tiles.clamp_(max=num_queries - 1)
    starts, ends = by_query[tiles].unbind(2)
    own_start = tiles[:, :1] // block_size * block_size + num_context
    own_end = (tiles[:, -1:] // block_size + 1) * block_size + num_context

    keys = torch.arange(0, num_context + copies[-1] * num_queries, TILE)
    seen = (keys < ends.amax(1, keepdim=True)) & (keys + TILE > starts.amin(1, keepdim=True))
    whole = (keys >= starts.amax(1, keepdim=True)) & (keys + TILE <= ends.amin(1, keepdim=True)) & filled
    sees = _sight(by_query, num_context, block_size, copies[-1], device)
    masks, num_copies = [], 0
    for wanted in copies:
        for copy in range(num_copies, wanted):
            before = copy * num_queries
            seen |= (keys < own_end + before) & (keys + TILE > own_start + before)
        num_copies = wanted
        num_keys = num_context + num_copies * num_queries
        there = slice(len(range(0, num_keys, TILE)))
        masks.append(
            BlockMask.from_kv_blocks(
                *_tile_lists((seen & ~whole)[:, there].to(device)),
                *_tile_lists(whole[:, there].to(device)),
                BLOCK_SIZE=TILE,
                mask_mod=sees,
                seq_lengths=(num_queries, num_keys),
            )
        )
    return masks


def attend_spans(queries: Tensor, pieces: Sequence[KeyValues], mask: BlockMask, scale: float) -> Tensor:
    """Softmax attention under a mask of `span_masks`.

    Args:
        queries: [1, H, Q, d], rotated.
        pieces: Context rows, then a copy of the queries' own rows each: [1, K, N or Q, d].
        mask: For as many copies.
        scale: Multiplies the scores.

    Returns:
        [1, H, Q, d].
    """
    keys, values = (torch.cat(rows, dim=2) for rows in zip(*pieces, strict=True))
    grouped = queries.shape[1] != keys.shape[1]
    return _compiled_flex()(queries, keys, values, block_mask=mask, scale=scale, enable_gqa=grouped)


@cache
def _compiled_flex() -> Callable[..., Tensor]:
    """FlexAttention as a kernel; the numbers of queries and keys change from batch to batch.

    Whole or not at all (``fullgraph``): more variants than the limit are an error.
    """
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, MOST_KERNELS)
    return torch.compile(flex_attention, dynamic=True, fullgraph=True)


def _sight(
    by_query: Tensor, num_context: int, block_size: int, num_copies: int, device: torch.device
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """What a single query sees. It knows numbers from tensors alone, because kernels are compiled for plain ones."""
    starts, ends = by_query.t().contiguous().to(device).unbind()
    block_of_query = torch.arange(len(by_query), dtype=torch.int32) // block_size
    nobody = torch.full((num_context,), -1, dtype=torch.int32)
    block_of_key = torch.cat([nobody, block_of_query.repeat(num_copies)]).to(device)
    block_of_query = block_of_query.to(device)

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        in_context = (key >= starts[query]) & (key < ends[query])
        return in_context | (block_of_key[key] == block_of_query[query])

    return sees


def _tile_lists(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """How many key tiles each query tile has, [1, 1, tiles], and which, [1, 1, tiles, key tiles], the chosen first."""
    order = chosen.int().argsort(dim=1, descending=True, stable=True)
    return chosen.sum(1).int()[None, None], order.int()[None, None].contiguous()
