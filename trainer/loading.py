"""How a rank gets a micro-batch: lease samples, read them, pack them, bring them to its device."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Sequence

import torch

from services.contracts import SampleLease, TableSignature, Use
from services.errors import ReplayUnavailableError, TableLostError
from services.prompts.plan import anchor_seed
from services.replay.reader import CapturedSample, ReplayReader
from trainer.collate import MicroBatch, collate
from trainer.recipe import Recipe


class MicroBatchLoader:
    """Makes micro-batches from what is in the replay buffer; called by the prefetching thread.

    Args:
        reader: Reads the table.
        recipe: Sizes, seed and deadlines.
        signature: The table's.
        rank: Who leases.
        generation: Of the trainer group.
        device: Where micro-batches go.
        dtype: Of the features there.
        hold: Hears of the leases whose samples are in memory, and says whether they still count.
    """

    def __init__(
        self,
        reader: ReplayReader,
        recipe: Recipe,
        signature: TableSignature,
        *,
        rank: int,
        generation: int,
        device: torch.device,
        dtype: torch.dtype,
        hold: Callable[[Sequence[SampleLease]], bool],
    ) -> None:
        self._reader = reader
        self._config = recipe.trainer
        self._lease_s = recipe.replay.lease_s
        self._anchor_seed = recipe.prompts.seed
        self._signature = signature
        self._rank = rank
        self._generation = generation
        self._device = device
        self._dtype = dtype
        self._hold = hold

    def load(self, captures: Sequence[int] | None, cancelled: threading.Event) -> MicroBatch:
        """Wait for samples and make a micro-batch of them: fewer than usual, or none, at the end of the plan.

        Args:
            captures: Take exactly these (deterministic mode); None takes whatever is ready.
            cancelled: Ends the wait early; the micro-batch is then empty.

        Raises:
            DeadlineError: The buffer does not give the samples in time.
        """
        samples = self._take(captures, cancelled)
        micro_batch = collate(
            samples,
            [self._seed(sample.lease) for sample in samples],
            context_width=len(self._signature.layer_ids) * self._signature.hidden_size,
            hidden_size=self._signature.hidden_size,
        )
        return micro_batch.to(self._device, self._dtype)

    def ack(self, micro_batch: MicroBatch) -> None:
        """End the leases of a micro-batch: the last use of a sample frees its bytes."""
        if micro_batch.leases:
            self._reader.ack(micro_batch.leases, self._generation, timeout_s=self._config.wait_s)

    def update_priorities(self, micro_batch: MicroBatch, rejections: torch.Tensor) -> None:
        """Have the table know how much of what was drafted for each sample was rejected.

        Args:
            micro_batch: What was trained.
            rejections: [B], of its samples; NaN says nothing.
        """
        if micro_batch.leases:
            captures = [lease.sample.job.capture for lease in micro_batch.leases]
            pairs = zip(captures, rejections.tolist(), strict=True)
            # Samples of a Redis that is gone have no priority any more.
            with contextlib.suppress(ReplayUnavailableError, TableLostError):
                self._reader.update_priorities({capture: value for capture, value in pairs if not math.isnan(value)})

    def _take(self, captures: Sequence[int] | None, cancelled: threading.Event) -> list[CapturedSample]:
        if captures is not None and not captures:
            return []  # the plan ended on another rank
        return self._reader.take(
            rank=self._rank,
            generation=self._generation,
            count=self._config.layout.samples_per_pass,
            lease_s=self._lease_s,
            timeout_s=self._config.wait_s,
            hold=self._hold,
            captures=captures,
            cancelled=cancelled,
        )

    def _seed(self, lease: SampleLease) -> int:
        job = lease.sample.job
        return anchor_seed(self._anchor_seed, Use(prompt=job.prompt, epoch=job.epoch, k=lease.k))
