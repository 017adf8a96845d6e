"""One packed micro-batch, and how it comes to the device it is trained on.

Letters: B samples of the micro-batch, ΣT tokens of all of them, L captured layers, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from drafters import FeatureBatch
from services.buffers import Buffer, Copied
from services.contracts import SampleLease

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
        num_bytes: Of the features.
        buffer: What `features` lie in, to be given back once nothing reads them any more; None where they own their
            memory.
        copied: Done when everything is on the device; None if it is.
    """

    features: FeatureBatch
    sample_weights: Tensor
    importance_weights: Tensor
    anchor_seeds: tuple[int, ...]
    leases: tuple[SampleLease, ...]
    num_tokens: int
    num_bytes: int
    buffer: Buffer | None = None
    copied: Copied | None = None

    def wait_until_there(self) -> None:
        """Wait until everything is on the device."""
        if self.copied is not None:
            self.copied.synchronize()


def packed(
    leases: Sequence[SampleLease],
    anchor_seeds: Sequence[int],
    context: Tensor,
    last: Tensor,
    buffer: Buffer | None = None,
) -> MicroBatch:
    """A micro-batch of samples whose features are in place.

    Args:
        leases: Of the samples, in the order in which they stand end to end.
        anchor_seeds: One for each sample.
        context: [1, ΣT, L·D].
        last: [1, ΣT, D].
        buffer: What the two lie in.
    """
    jobs = [lease.sample.job for lease in leases]
    return MicroBatch(
        features=FeatureBatch.from_tensors(
            torch.tensor([token for job in jobs for token in job.input_ids])[None],
            torch.tensor([counts for job in jobs for counts in job.loss_mask])[None],
            None,
            context,
            last,
            sample_lengths=[job.num_tokens for job in jobs],
        ),
        sample_weights=torch.ones(len(leases)),
        importance_weights=torch.tensor([lease.importance for lease in leases], dtype=torch.float32),
        anchor_seeds=tuple(anchor_seeds),
        leases=tuple(leases),
        num_tokens=context.shape[1],
        num_bytes=context.nbytes + last.nbytes,
        buffer=buffer,
    )


def without_samples(context_width: int, hidden_size: int, dtype: torch.dtype) -> MicroBatch:
    """What a rank trains on when the plan ended on another: its collectives must run all the same.

    Args:
        context_width: L·D.
        hidden_size: D.
        dtype: Of the features.
    """
    ids = torch.zeros(1, EMPTY_ROW_TOKENS, dtype=torch.long)
    context, last = (torch.zeros(*ids.shape, width, dtype=dtype) for width in (context_width, hidden_size))
    return MicroBatch(
        features=FeatureBatch.from_tensors(ids, torch.zeros_like(ids), None, context, last),
        sample_weights=torch.zeros(1),
        importance_weights=torch.ones(1),
        anchor_seeds=(0,),
        leases=(),
        num_tokens=0,
        num_bytes=context.nbytes + last.nbytes,
    )


class DeviceCopy:
    """Copies micro-batches to a GPU on a stream of its own, so that copies and the step's kernels overlap.

    Args:
        device: The GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copying = torch.cuda.Stream(device)
        self._training = torch.cuda.default_stream(device)

    def begin(self, micro_batch: MicroBatch) -> MicroBatch:
        """Begin to copy; the micro-batch on the device knows when it is there (`wait_until_there`)."""
        copied = torch.cuda.Event()
        with torch.cuda.stream(self._copying):
            features = micro_batch.features
            moved = replace(
                micro_batch,
                features=FeatureBatch(
                    self._move(features.input_ids),
                    self._move(features.loss_mask),
                    self._move(features.attention_mask),
                    self._move(features.target_hidden_states),
                    self._move(features.target_last_hidden_states),
                    self._move(features.loss_lengths),
                    features.sample_lengths,
                ),
                sample_weights=self._move(micro_batch.sample_weights),
                importance_weights=self._move(micro_batch.importance_weights),
                buffer=None,
                copied=copied,
            )
            copied.record(self._copying)
        if micro_batch.buffer is not None:
            micro_batch.buffer.release(copied)
        return moved

    def _move(self, tensor: Tensor) -> Tensor:
        pinned = tensor if tensor.is_pinned() else tensor.pin_memory()
        moved = pinned.to(self._device, non_blocking=True)
        moved.record_stream(self._training)  # the allocator must not hand the memory out while a step still reads it
        return moved
