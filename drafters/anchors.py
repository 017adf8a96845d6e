"""Where blocks start, and what their slots are supervised with (specs: "Anchors", "Block", "Supervision")."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Anchors(NamedTuple):
    """Drawn anchors, ascending in each row; missing ones are dummies at position 0.

    Attributes:
        positions: [B, A] int64.
        keep: [B, A] bool; false for dummies.
    """

    positions: Tensor
    keep: Tensor


class Slots(NamedTuple):
    """What the slots of all blocks are scored against.

    Attributes:
        labels: [B, A, γ] int64; slot k of the block at anchor a has token a + k + 1. Past the end of the row: its last.
        target_rows: [B, A, γ] int64; row of the target's last hidden state that predicts the label.
        eval_mask: [B, A, γ] bool; false from the first slot on whose label is not supervised.
    """

    labels: Tensor
    target_rows: Tensor
    eval_mask: Tensor


def anchor_candidates(loss_mask: Tensor) -> Tensor:
    """Positions that may be anchors: they and their next token are supervised. [B, T] bool → [B, T] bool."""
    loss_mask = loss_mask.bool()
    candidates = torch.zeros_like(loss_mask)
    candidates[..., :-1] = loss_mask[..., :-1] & loss_mask[..., 1:]
    return candidates


def seeded_generators(seeds: Sequence[int] | None, num_rows: int) -> list[torch.Generator]:
    """One CPU generator a row; without seeds torch's global generator gives them.

    Raises:
        ValueError: There are more or fewer seeds than rows.
    """
    if seeds is None:
        seeds = torch.randint(2**63 - 1, (num_rows,)).tolist()
    if len(seeds) != num_rows:
        raise ValueError(f"{len(seeds)} anchor seeds for {num_rows} rows: give one a row")
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def draw_anchors(loss_mask: Tensor, num_anchors: int, generators: Sequence[torch.Generator]) -> Anchors:
    """Draw up to ``num_anchors`` candidates of each row without replacement.

    A is the most that any row has, at least 1: rows that have fewer get dummies. A row's anchors depend on its own loss
    mask and generator alone.

    Args:
        loss_mask: [B, T] bool.
        num_anchors: Most anchors of a row.
        generators: One CPU generator a row.
    """
    candidates = anchor_candidates(loss_mask).cpu()
    drawn = []
    for row, generator in zip(candidates, generators, strict=True):
        places = row.nonzero().squeeze(1)
        order = torch.randperm(len(places), generator=generator)[:num_anchors]
        drawn.append(places[order].sort().values)
    width = max(1, *(len(places) for places in drawn))
    positions = torch.zeros(len(drawn), width, dtype=torch.long)
    keep = torch.zeros(len(drawn), width, dtype=torch.bool)
    for row, places in enumerate(drawn):
        positions[row, : len(places)] = places
        keep[row, : len(places)] = True
    return Anchors(positions, keep)


def block_positions(positions: Tensor, block_size: int) -> Tensor:
    """Positions of all block inputs: [B, A] → [B, A, γ], input k at anchor + k."""
    return positions[..., None] + torch.arange(block_size, device=positions.device)


def block_inputs(input_ids: Tensor, anchors: Anchors, block_size: int, mask_token_id: int) -> Tensor:
    """Token ids of all block inputs, [B, A, γ]: the anchor token, then mask tokens; a dummy has mask tokens only."""
    inputs = input_ids.new_full((*anchors.positions.shape, block_size), mask_token_id)
    anchor_ids = input_ids.gather(1, anchors.positions)
    inputs[..., 0] = torch.where(anchors.keep, anchor_ids, mask_token_id)
    return inputs


def supervise(input_ids: Tensor, loss_mask: Tensor, anchors: Anchors, block_size: int) -> Slots:
    """Labels, target rows and evaluation mask of all slots.

    Args:
        input_ids: [B, T] int64.
        loss_mask: [B, T] bool.
        anchors: [B, A].
        block_size: γ.
    """
    batch, length = input_ids.shape
    places = block_positions(anchors.positions, block_size) + 1
    inside = places < length
    label_places = places.clamp(max=length - 1) * anchors.keep[..., None]
    flat = label_places.flatten(1)
    labels = input_ids.gather(1, flat).view(batch, -1, block_size)
    supervised = loss_mask.bool().gather(1, flat).view(batch, -1, block_size)
    valid = supervised & inside & anchors.keep[..., None]
    return Slots(
        labels=labels,
        target_rows=(label_places - 1).clamp(min=0),
        eval_mask=valid.long().cumprod(-1).bool(),
    )
