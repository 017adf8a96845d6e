"""How a rank gets a micro-batch: lease samples, choose which go together, read them into place, free them later."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

import torch

from services.contracts import SampleLease, TableSignature, Use
from services.errors import ReplayUnavailableError, TableLostError, UnknownSampleError
from services.prompts.plan import anchor_seed
from services.replay.reader import ReplayReader
from trainer.assembly import Assembler
from trainer.collate import MicroBatch
from trainer.packing_order import balance
from trainer.prefetch import Room
from trainer.recipe import Recipe

AT_ONCE = threading.Event()
AT_ONCE.set()
"""Ends a wait before it begins: what is ready is leased, or nothing."""


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
        self._rank = rank
        self._generation = generation
        self._hold = hold
        self._assembler = Assembler(reader.reading, signature, device=device, dtype=dtype)
        self._window: deque[list[SampleLease]] = deque()
        """Leases of micro-batches to come in the same step, as they go together."""

    def load(self, captures: Sequence[int] | None, num_left: int, room: Room) -> MicroBatch:
        """Wait for samples and room and make a micro-batch; the end of the plan has fewer samples than usual, or none.

        Samples that are lost with their Redis are passed over for others.

        Args:
            captures: Take exactly these (deterministic mode); None takes whatever is ready.
            num_left: Micro-batches that the step still takes, this one included.
            room: Where it waits until the loop takes it. Once that is closed, the micro-batch is empty.

        Raises:
            DeadlineError: The buffer does not give the samples in time.
        """
        while not room.closed.is_set():
            leases = self._next_leases(num_left, room) if captures is None else self._lease_named(captures, room)
            if not leases or not room.wait_for(self._assembler.num_bytes(leases)):
                break
            micro_batch = self._read(leases)
            if micro_batch is not None:
                return micro_batch
        return self._assembler.empty()

    def ack(self, micro_batch: MicroBatch) -> None:
        """End the leases of a micro-batch that nothing reads any more: the last use of a sample frees its bytes."""
        if micro_batch.leases:
            self._reader.ack(micro_batch.leases, self._generation, timeout_s=self._config.wait_s)
        self._assembler.release(micro_batch)

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

    def _next_leases(self, num_left: int, room: Room) -> list[SampleLease]:
        """Those of the next micro-batch; none at the end of the plan."""
        if not self._window:
            self._window.extend(self._lease_window(num_left, room))
        return self._window.popleft() if self._window else []

    def _lease_window(self, num_left: int, room: Room) -> list[list[SampleLease]]:
        """Lease what is ready for the passes to come and choose which samples go together (`trainer.packing_order`).

        Only the first pass's samples are waited for. More are leased only as far as their bytes will have room ahead
        of the step, the last of them not counted, so that no rank takes from the buffer what it cannot hold.
        """
        if not room.wait_for(room.depth_bytes // 2 if num_left > 1 else 1):
            return []
        passes = [self._lease(room.closed)]
        leased_bytes = self._assembler.num_bytes(passes[0])
        while passes[-1] and len(passes) < num_left and leased_bytes < room.free_bytes:
            passes.append(self._lease(AT_ONCE))
            leased_bytes += self._assembler.num_bytes(passes[-1])
        leases = [lease for leases in passes for lease in leases]
        num_tokens = [lease.sample.job.num_tokens for lease in leases]
        together = balance(num_tokens, [len(leases) for leases in passes if leases])
        return [[leases[index] for index in indices] for indices in together]

    def _lease_named(self, captures: Sequence[int], room: Room) -> list[SampleLease]:
        if not captures or not room.wait_for(1):
            return []  # the plan ended on another rank, or the run did
        return self._lease(room.closed, captures)

    def _lease(self, cancelled: threading.Event, captures: Sequence[int] | None = None) -> list[SampleLease]:
        return self._reader.lease(
            rank=self._rank,
            generation=self._generation,
            count=self._config.layout.samples_per_pass,
            lease_s=self._lease_s,
            timeout_s=self._config.wait_s,
            captures=captures,
            cancelled=cancelled,
        )

    def _read(self, leases: Sequence[SampleLease]) -> MicroBatch | None:
        """The micro-batch of these leases; None if it must be made of others."""
        try:
            micro_batch = self._assembler.assemble(leases, [self._seed(lease) for lease in leases])
        except (ReplayUnavailableError, TableLostError, UnknownSampleError):
            if not self._reader.are_lost(leases, time.monotonic() + self._config.wait_s):
                raise
        else:
            if self._hold(leases):
                return micro_batch
            self._assembler.release(micro_batch)
        self._reader.drop(leases, self._generation)  # those of tables that still stand
        return None

    def _seed(self, lease: SampleLease) -> int:
        job = lease.sample.job
        return anchor_seed(self._anchor_seed, Use(prompt=job.prompt, epoch=job.epoch, k=lease.k))
