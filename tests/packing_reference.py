"""Packing as anyone would write it first: samples as tensors of their own, then `torch.cat`."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from services.replay.reader import CapturedSample
from trainer.collate import MicroBatch, packed


def collate(samples: Sequence[CapturedSample], anchor_seeds: Sequence[int], dtype: torch.dtype) -> MicroBatch:
    """Pack samples end to end, with zeros for each last hidden state that did not travel."""
    lengths = [len(sample.input_ids) for sample in samples]
    last = torch.zeros(sum(lengths), samples[0].last.shape[1], dtype=samples[0].last.dtype)
    for piece, sample in zip(last.split(lengths), samples, strict=True):
        piece[sample.last_rows] = sample.last
    return packed(
        [sample.lease for sample in samples],
        anchor_seeds,
        torch.cat([sample.context for sample in samples])[None].to(dtype),
        last[None].to(dtype),
    )
