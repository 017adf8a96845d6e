"""From captured samples to one padded micro-batch.

Letters: B rows of the micro-batch, T longest sample, L captured layers, D hidden size.
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
        features: B rows; those beyond `leases` are padding.
        sample_weights: [B] float32: 1 for a sample, 0 for padding.
        anchor_seeds: B seeds, one a row.
        leases: Leases of the samples, in the order of the rows.
        num_tokens: Tokens of all samples, padding not counted.
    """

    features: FeatureBatch
    sample_weights: Tensor
    anchor_seeds: tuple[int, ...]
    leases: tuple[SampleLease, ...]
    num_tokens: int

    def to(self, device: torch.device, dtype: torch.dtype) -> MicroBatch:
        """The same micro-batch on a device, with features in the drafter's dtype. Copies to a GPU overlap its work."""
        if device.type == "cuda":
            return _through_pinned_memory(self, device, dtype)
        return replace(self, features=_cast(self.features, dtype))


def collate(
    samples: Sequence[CapturedSample],
    anchor_seeds: Sequence[int],
    *,
    num_rows: int,
    context_width: int,
    hidden_size: int,
) -> MicroBatch:
    """Pad samples to one length, and to `num_rows` rows with rows of weight zero.

    Args:
        samples: At most `num_rows`; none at all gives a micro-batch that trains nothing.
        anchor_seeds: One for each sample.
        num_rows: B, the same for every micro-batch of every rank.
        context_width: L·D.
        hidden_size: D.
    """
    assert len(samples) == len(anchor_seeds) <= num_rows
    length = max((len(sample.input_ids) for sample in samples), default=EMPTY_ROW_TOKENS)
    dtype = samples[0].context.dtype if samples else torch.float32
    input_ids = torch.zeros(num_rows, length, dtype=torch.long)
    loss_mask = torch.zeros(num_rows, length, dtype=torch.bool)
    attention_mask = torch.zeros(num_rows, length, dtype=torch.bool)
    context = torch.zeros(num_rows, length, context_width, dtype=dtype)
    last = torch.zeros(num_rows, length, hidden_size, dtype=dtype)
    loss_lengths = torch.full((num_rows,), float(length))
    for row, sample in enumerate(samples):
        num_tokens = len(sample.input_ids)
        input_ids[row, :num_tokens] = sample.input_ids
        loss_mask[row, :num_tokens] = sample.loss_mask.bool()
        attention_mask[row, :num_tokens] = True
        context[row, :num_tokens] = sample.context
        last[row, sample.last_rows] = sample.last
        loss_lengths[row] = num_tokens  # a sample counts the same whatever it is padded to
    num_padding = num_rows - len(samples)
    return MicroBatch(
        features=FeatureBatch.from_tensors(input_ids, loss_mask, attention_mask, context, last, loss_lengths),
        sample_weights=torch.tensor([1.0] * len(samples) + [0.0] * num_padding),
        anchor_seeds=(*anchor_seeds, *[0] * num_padding),
        leases=tuple(sample.lease for sample in samples),
        num_tokens=sum(len(sample.input_ids) for sample in samples),
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
                ),
                dtype,
            ),
            sample_weights=move(micro_batch.sample_weights),
        )
        for tensor in (moved.features.target_hidden_states, moved.features.target_last_hidden_states):
            tensor.record_stream(training)  # the cast may have made a new one
        copying.synchronize()
    return moved
