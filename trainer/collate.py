"""From captured samples to one packed micro-batch.

Letters: B samples of the micro-batch, L captured layers, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from drafters import FeatureBatch
from services.contracts import SampleLease

if TYPE_CHECKING:
    from services.replay.reader import CapturedSample

EMPTY_ROW_TOKENS = 2
"""Length of a micro-batch without any sample: the shortest that has a token and a next one."""


@dataclass(frozen=True)
class MicroBatch:
    """What one rank trains on in one forward pass.

    Attributes:
        features: B samples, packed in one row.
        sample_weights: [B] float32: 1, and 0 for the one that stands for none.
        importance_weights: [B] float32, what each sample's loss is multiplied by: that of its lease.
        anchor_seeds: B seeds, one a sample.
        leases: Leases of the samples, in their order.
        num_tokens: Tokens of all samples, padding not counted.
    """

    features: FeatureBatch
    sample_weights: Tensor
    importance_weights: Tensor
    anchor_seeds: tuple[int, ...]
    leases: tuple[SampleLease, ...]
    num_tokens: int

    def to(self, device: torch.device, dtype: torch.dtype) -> MicroBatch:
        """The same micro-batch on a device, with features in the drafter's dtype. Copies to a GPU overlap its work."""
        if device.type == "cuda":
            return _through_pinned_memory(self, device, dtype)
        return replace(self, features=_cast(self.features, dtype))


def collate(
    samples: Sequence[CapturedSample], anchor_seeds: Sequence[int], *, context_width: int, hidden_size: int
) -> MicroBatch:
    """Pack samples end to end in one row, without padding.

    Args:
        samples: None at all gives a micro-batch of one sample of weight zero, which trains nothing.
        anchor_seeds: One for each sample.
        context_width: L·D.
        hidden_size: D.
    """
    assert len(samples) == len(anchor_seeds)
    if not samples:
        return _empty(context_width, hidden_size)
    lengths = [len(sample.input_ids) for sample in samples]
    last = torch.zeros(sum(lengths), hidden_size, dtype=samples[0].last.dtype)
    for piece, sample in zip(last.split(lengths), samples, strict=True):
        piece[sample.last_rows] = sample.last
    return MicroBatch(
        features=FeatureBatch.from_tensors(
            torch.cat([sample.input_ids for sample in samples])[None],
            torch.cat([sample.loss_mask for sample in samples])[None],
            None,
            torch.cat([sample.context for sample in samples])[None],
            last[None],
            sample_lengths=lengths,
        ),
        sample_weights=torch.ones(len(samples)),
        importance_weights=torch.tensor([sample.lease.importance for sample in samples], dtype=torch.float32),
        anchor_seeds=tuple(anchor_seeds),
        leases=tuple(sample.lease for sample in samples),
        num_tokens=sum(lengths),
    )


def _empty(context_width: int, hidden_size: int) -> MicroBatch:
    """What a rank trains on when the plan ended on another: its collectives must run all the same."""
    ids = torch.zeros(1, EMPTY_ROW_TOKENS, dtype=torch.long)
    context, last = (torch.zeros(*ids.shape, width) for width in (context_width, hidden_size))
    return MicroBatch(
        features=FeatureBatch.from_tensors(ids, torch.zeros_like(ids), None, context, last),
        sample_weights=torch.zeros(1),
        importance_weights=torch.ones(1),
        anchor_seeds=(0,),
        leases=(),
        num_tokens=0,
    )


def _cast(features: FeatureBatch, dtype: torch.dtype) -> FeatureBatch:
    return replace(
        features,
        target_hidden_states=features.target_hidden_states.to(dtype),
        target_last_hidden_states=features.target_last_hidden_states.to(dtype),
    )


def _through_pinned_memory(micro_batch: MicroBatch, device: torch.device, dtype: torch.dtype) -> MicroBatch:
    """Copy on a stream of its own, so that the copy waits for no kernel of the step, nor the step for the copy."""
    copying, training = torch.cuda.Stream(device), torch.cuda.default_stream(device)

    def move(tensor: Tensor) -> Tensor:
        moved = tensor.pin_memory().to(device, non_blocking=True)
        moved.record_stream(training)  # the allocator must not hand the memory out while a step still reads it
        return moved

    with torch.cuda.stream(copying):
        features = micro_batch.features
        moved = replace(
            micro_batch,
            features=_cast(
                FeatureBatch(
                    move(features.input_ids),
                    move(features.loss_mask),
                    move(features.attention_mask),
                    move(features.target_hidden_states),
                    move(features.target_last_hidden_states),
                    move(features.loss_lengths),
                    features.sample_lengths,
                ),
                dtype,
            ),
            sample_weights=move(micro_batch.sample_weights),
            importance_weights=move(micro_batch.importance_weights),
        )
        for tensor in (moved.features.target_hidden_states, moved.features.target_last_hidden_states):
            tensor.record_stream(training)  # the cast may have made a new one
        copying.synchronize()
    return moved
