"""Where blocks start, and what their slots are supervised with (specs: "Anchors", "Block", "Supervision")."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import starmap
from typing import NamedTuple, Self

import torch
from torch import Tensor

from drafters.batch import Span


class Anchors(NamedTuple):
    """Drawn anchors, ascending in each row; missing ones are dummies at position 0.

    Attributes:
        positions: [B, A] int64.
        keep: [B, A] bool; false for dummies.
    """

    positions: Tensor
    keep: Tensor

    def checked(self, samples: Sequence[Span]) -> Self:
        """The same, if every sample has as many anchors as the others and none outside itself.

        Raises:
            ValueError: It has not.
        """
        shapes = tuple(self.positions.shape), tuple(self.keep.shape)
        if shapes[0] != shapes[1] or len(shapes[0]) != 2 or shapes[0][0] != len(samples) or not shapes[0][1]:
            raise ValueError(
                f"anchors are {list(shapes[0])} positions and {list(shapes[1])} keep, but both must be [B, A] with B "
                f"{len(samples)} and A at least 1"
            )
        lengths = torch.tensor([sample.end - sample.start for sample in samples], device=self.positions.device)
        outside = (self.positions < 0) | (self.positions >= lengths[:, None])
        if outside.any():
            sample, place = outside.nonzero()[0].tolist()
            raise ValueError(
                f"anchor {int(self.positions[sample, place])} of sample {sample} is none of its {int(lengths[sample])} "
                "positions"
            )
        return self


class Slots(NamedTuple):
    """What the slots of all blocks are scored against.

    Attributes:
        labels: [B, A, γ] int64; slot k of the block at anchor a has token a + k + 1. Past the sample's end: its last.
        target_rows: [B, A, γ] int64; row of the target's last hidden state, of all samples end to end, that predicts
            the label.
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


def draw_anchors(loss_masks: Iterable[Tensor], num_anchors: int, generators: Sequence[torch.Generator]) -> Anchors:
    """Draw up to ``num_anchors`` candidates of each sample without replacement.

    A is the most that any sample has, at least 1: samples that have fewer get dummies. A sample's anchors depend on its
    own loss mask and generator alone.

    Args:
        loss_masks: Of each sample, [T] bool.
        num_anchors: Most anchors of a sample.
        generators: One CPU generator a sample.
    """
    drawn = []
    for loss_mask, generator in zip(loss_masks, generators, strict=True):
        places = anchor_candidates(loss_mask).cpu().nonzero().squeeze(1)
        order = torch.randperm(len(places), generator=generator)[:num_anchors]
        drawn.append(places[order].sort().values)
    width = max(1, *(len(places) for places in drawn))
    positions = torch.zeros(len(drawn), width, dtype=torch.long)
    keep = torch.zeros(len(drawn), width, dtype=torch.bool)
    for row, places in enumerate(drawn):
        positions[row, : len(places)] = places
        keep[row, : len(places)] = True
    return Anchors(positions, keep)


class PackedBlocks(NamedTuple):
    """The blocks of all samples in one row, without dummies; if there is no other block, one dummy.

    Attributes:
        chosen: [M] int64, which of the [B · A] anchors they start at.
        anchors: [M] int64 positions, within their samples.
        anchor_rows: [M] int64 places of the anchors among the tokens of all samples.
        context_rows: [N] int64 places of the context rows that any block sees.
        spans: For each block, the context rows that it sees, counted among the N.
        context_positions: [N] int64 positions of the context rows, within their samples.
    """

    chosen: Tensor
    anchors: Tensor
    anchor_rows: Tensor
    context_rows: Tensor
    spans: tuple[Span, ...]
    context_positions: Tensor

    @classmethod
    def of(cls, anchors: Anchors, samples: Sequence[Span]) -> Self:
        """Pack the kept anchors [B, A] of B samples; the result is on the CPU."""
        positions, keep = anchors.positions.cpu(), anchors.keep.cpu()
        chosen = keep.flatten().nonzero().squeeze(1)
        places = positions.flatten()[chosen]
        if not len(chosen):
            chosen = places = torch.zeros(1, dtype=torch.long)
        sample_of = chosen // positions.shape[1]
        starts = torch.tensor([sample.start for sample in samples])
        needed = torch.zeros_like(starts).scatter_reduce_(0, sample_of, places, "amax")
        if not needed.any():
            needed[0] = 1  # layers with a batch of no rows have no shape to infer
        firsts = needed.cumsum(0) - needed
        context_positions = torch.cat([torch.arange(count) for count in needed.tolist()])
        begins = firsts[sample_of]
        return cls(
            chosen=chosen,
            anchors=places,
            anchor_rows=places + starts[sample_of],
            context_rows=context_positions + starts.repeat_interleave(needed),
            spans=tuple(starmap(Span, zip(begins.tolist(), (begins + places).tolist(), strict=True))),
            context_positions=context_positions,
        )


def block_positions(positions: Tensor, block_size: int) -> Tensor:
    """Positions of all block inputs: [...] → [..., γ], input k at anchor + k."""
    return positions[..., None] + torch.arange(block_size, device=positions.device)


def block_inputs(anchor_ids: Tensor, block_size: int, mask_token_id: int) -> Tensor:
    """Token ids of all block inputs: [M] → [M, γ], the anchor token, then mask tokens."""
    inputs = anchor_ids.new_full((len(anchor_ids), block_size), mask_token_id)
    inputs[:, 0] = anchor_ids
    return inputs


def supervise(
    input_ids: Tensor, loss_mask: Tensor, anchors: Anchors, block_size: int, samples: Sequence[Span]
) -> Slots:
    """Labels, target rows and evaluation mask of all slots.

    Args:
        input_ids: Tokens of all samples, of any shape, int64.
        loss_mask: Of the same shape, bool.
        anchors: [B, A].
        block_size: γ.
        samples: Where the B samples stand among the tokens.
    """
    starts, ends = torch.tensor(samples, device=input_ids.device).T[..., None, None]
    places = starts + block_positions(anchors.positions, block_size) + 1
    label_places = torch.where(anchors.keep[..., None], places.clamp(max=ends - 1), starts)
    valid = loss_mask.bool().flatten()[label_places] & (places < ends) & anchors.keep[..., None]
    return Slots(
        labels=input_ids.flatten()[label_places],
        target_rows=torch.maximum(label_places - 1, starts),
        eval_mask=valid.long().cumprod(-1).bool(),
    )
