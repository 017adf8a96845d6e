"""Which positions Eagle3's training runs and scores (specs: "Training-time test").

Position p of a sample is scored at step i if the drafter can predict token p + 2 from p − i on: its output there, at
that step, goes against row p + 1 of the target's last hidden state. So of each sample only the positions from its first
scored one minus the steps to its last scored one have queries, while step 0 has keys from the sample's start on. The
rows of all samples stand end to end: neither padding nor prompts cost more than their keys.

Letters beside those of `drafters.batch`: N scored positions, W rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor
from torch.nn import functional

from drafters.batch import FeatureBatch, Span


class Supervision(NamedTuple):
    """Scored positions of a batch, in order.

    Attributes:
        tokens: [N] int64, where each stands among all tokens of the batch.
        samples: [N] int64, the sample of each.
        places: [N] int64, its position p in its sample.
        spans: Positions of each sample that have queries.
    """

    tokens: Tensor
    samples: Tensor
    places: Tensor
    spans: tuple[Span, ...]

    @classmethod
    def of_batch(cls, batch: FeatureBatch, sample_weights: Tensor, reach: int | None) -> Self:
        """Positions that are supervised, in a sample of weight above 0, with a target row after them.

        Args:
            batch: Its samples.
            sample_weights: [samples].
            reach: How far before a scored position a query can lie; None asks for queries from the sample's start on.
        """
        device = batch.input_ids.device
        starts, ends = (torch.tensor(edges, device=device) for edges in zip(*batch.samples, strict=True))
        counts = batch.loss_mask.flatten() & batch.attention_mask.flatten().roll(-1)
        counts &= (sample_weights > 0).repeat_interleave(ends - starts)
        counts[ends - 1] = False
        tokens = counts.nonzero().squeeze(1)
        samples = torch.searchsorted(ends, tokens, right=True)
        places = tokens - starts[samples]
        by_sample = places.cpu().split(samples.bincount(minlength=len(starts)).tolist())
        spans = [_span(own, reach) for own in by_sample]
        if not len(places):
            spans[0] = Span(0, 1)  # some row must carry the zero gradient
        return cls(tokens, samples, places, tuple(spans))

    def over_everything(self, batch: FeatureBatch) -> Supervision:
        """The same with queries at all positions."""
        return self._replace(spans=tuple(Span(0, end - start) for start, end in batch.samples))


class PackedRows(NamedTuple):
    """Rows of all samples end to end.

    Attributes:
        tokens: [W] int64, ascending: where each stands among all tokens of the batch.
        places: [W] int64, where in its sample.
        lengths: Rows of each sample.
    """

    tokens: Tensor
    places: Tensor
    lengths: list[int]

    @classmethod
    def of_spans(cls, batch: FeatureBatch, spans: Sequence[Span]) -> Self:
        """The rows of one span of each sample."""
        places = torch.cat([torch.arange(start, end) for start, end in spans])
        lengths = [end - start for start, end in spans]
        starts = torch.tensor([sample.start for sample in batch.samples])
        tokens = places + starts.repeat_interleave(torch.tensor(lengths))
        device = batch.input_ids.device
        return cls(tokens.to(device), places.to(device), lengths)

    def find(self, tokens: Tensor) -> Tensor:
        """Which rows these tokens have, all of which must have one."""
        return torch.searchsorted(self.tokens, tokens)

    def shifted_ids(self, batch: FeatureBatch, shift: int) -> Tensor:
        """Token ids that many places after each row, [1, W]; 0 past the end of its sample."""
        starts, ends = (torch.tensor(edges) for edges in zip(*batch.samples, strict=True))
        num_tokens = (ends - starts).repeat_interleave(torch.tensor(self.lengths)).to(self.places.device)
        ids = functional.pad(batch.input_ids.flatten(), (0, shift))[self.tokens + shift]
        return torch.where(self.places + shift < num_tokens, ids, 0)[None]


def _span(places: Tensor, reach: int | None) -> Span:
    if not len(places):
        return Span(0, 0)
    return Span(0 if reach is None else max(0, int(places[0]) - reach), int(places[-1]) + 1)
