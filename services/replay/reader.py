"""How a trainer rank gets its samples: lease, fetch into tensors, acknowledge. The one module here that needs torch."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from services.codec import TORCH_DTYPES, byte_view
from services.contracts import SampleLease, TableSignature
from services.errors import (
    DeadlineError,
    ReplayUnavailableError,
    SignatureError,
    TableLostError,
    UnknownSampleError,
)
from services.replay.connect import connect
from services.replay.table import RedisTable

POLL_S = 0.01


class CapturedSample(NamedTuple):
    """One sample as tensors on the CPU. T tokens, L layers, D hidden size, R rows of the last hidden state."""

    lease: SampleLease
    input_ids: Tensor
    """LongTensor [T]."""
    loss_mask: Tensor
    """LongTensor [T], 0 or 1."""
    context: Tensor
    """[T, L·D] in the table's dtype: the layers' features side by side, in the signature's order."""
    last_rows: Tensor
    """LongTensor [R], ascending: which rows of the sequence `last` holds."""
    last: Tensor
    """[R, D] in the table's dtype: last hidden state after the final norm."""


class ReplayReader:
    """One rank's access to the table. A prefetching and an acknowledging thread may use it at once."""

    def __init__(
        self, redis_url: str, prefix: str, signature: TableSignature, *, clock: Callable[[], float] = time.time
    ) -> None:
        """Connect.

        Args:
            redis_url: The Redis that holds the table.
            prefix: Of its keys.
            signature: What the rank expects to read.
            clock: Seconds, shared with the shard.

        Raises:
            ReplayUnavailableError: Redis does not answer.
        """
        self._client = connect(redis_url)
        self._prefix = prefix
        self._signature = signature
        self._clock = clock
        self._table = RedisTable(self._client, prefix)
        self._checked = False
        self._dtype = TORCH_DTYPES[signature.dtype]

    def lease(
        self,
        *,
        rank: int,
        generation: int,
        count: int,
        lease_s: float,
        timeout_s: float,
        captures: Sequence[int] | None = None,
        cancelled: threading.Event | None = None,
    ) -> list[SampleLease]:
        """Lease a micro-batch, waiting until it is ready.

        Args:
            rank: Who leases.
            generation: Of the trainer group.
            count: How many uses. A sealed table may give fewer, or none once everything is leased.
            lease_s: The leases end by themselves this much later.
            timeout_s: Longest wait.
            captures: Lease exactly these, in this order; `count` is then ignored.
            cancelled: Ends the wait early with an empty list.

        Raises:
            DeadlineError: They were not ready in time; says what the table held.
            StaleGenerationError: The trainer group has been replaced.
            SignatureError: The table holds something else.
            ReplayUnavailableError: Redis did not answer up to the end.
            TableLostError: There was no table up to the end.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                self._check_signature()
                leases = self._table.lease(
                    rank=rank,
                    generation=generation,
                    count=count,
                    now_s=self._clock(),
                    lease_s=lease_s,
                    captures=captures,
                )
                if not leases and captures is None and self._is_exhausted():
                    return []
            except (ReplayUnavailableError, TableLostError):
                if time.monotonic() >= deadline:
                    raise
                leases = []  # Redis is being restarted; what it held is captured again
            if leases:
                return leases
            if time.monotonic() >= deadline:
                raise self._too_late(count, timeout_s, captures)
            if cancelled is None:
                time.sleep(POLL_S)
            elif cancelled.wait(POLL_S):
                return []

    def take(
        self,
        *,
        rank: int,
        generation: int,
        count: int,
        lease_s: float,
        timeout_s: float,
        hold: Callable[[Sequence[SampleLease]], bool],
        captures: Sequence[int] | None = None,
        cancelled: threading.Event | None = None,
    ) -> list[CapturedSample]:
        """Lease a micro-batch and read it. Samples that are lost with their Redis are passed over for others.

        Args:
            rank: Who leases.
            generation: Of the trainer group.
            count: How many uses.
            lease_s: The leases end by themselves this much later.
            timeout_s: Longest wait.
            hold: Hears of the leases whose samples are in memory, and says whether they still count.
            captures: Lease exactly these.
            cancelled: Ends the wait early with an empty list.

        Raises:
            SlipstreamError: As `lease` and `fetch` do.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            leases = self.lease(
                rank=rank,
                generation=generation,
                count=count,
                lease_s=lease_s,
                timeout_s=deadline - time.monotonic(),
                captures=captures,
                cancelled=cancelled,
            )
            try:
                samples = [self.fetch(lease) for lease in leases]
            except (ReplayUnavailableError, TableLostError, UnknownSampleError):
                if not self._is_lost(leases, deadline):
                    raise
            else:
                if hold(leases):
                    return samples

    def fetch(self, lease: SampleLease) -> CapturedSample:
        """Read a leased sample, chunk by chunk, into new tensors.

        Checksums and finiteness were checked once, by the shard on arrival (`services.replay.arrival`); here only sizes
        are.

        Raises:
            UnknownSampleError: A chunk is gone: the lease has ended.
            WireError: A chunk has another length than its record says.
        """
        job = lease.sample.job
        num_layers, hidden_size = len(self._signature.layer_ids), self._signature.hidden_size
        context = torch.empty(job.num_tokens, num_layers * hidden_size, dtype=self._dtype)
        last = torch.empty(len(job.last_rows), hidden_size, dtype=self._dtype)
        places = {
            "context": (byte_view(context), self._signature.context_row_bytes),
            "last": (byte_view(last), self._signature.last_row_bytes),
        }
        for index, chunk in enumerate(lease.sample.chunks):
            view, row_bytes = places[chunk.tensor]
            place = view[chunk.row_start * row_bytes : chunk.row_end * row_bytes]
            self._table.read_into(job, index, place)
        return CapturedSample(
            lease=lease,
            input_ids=torch.tensor(job.input_ids, dtype=torch.long),
            loss_mask=torch.tensor(job.loss_mask, dtype=torch.long),
            context=context,
            last_rows=torch.tensor(job.last_rows, dtype=torch.long),
            last=last,
        )

    def ack(self, leases: Sequence[SampleLease], generation: int, *, timeout_s: float = 0.0) -> None:
        """End leases after the backward pass that used their samples; the last use of a sample frees its bytes.

        Leases of a table that is no more have ended with it.

        Args:
            leases: From one call of `take`.
            generation: Of the trainer group.
            timeout_s: How long to wait for a Redis that does not answer.

        Raises:
            StaleGenerationError: The trainer group has been replaced.
            UnknownSampleError: A lease is not held any more. Nothing is changed.
            ReplayUnavailableError: Redis did not answer in time.
        """
        deadline = time.monotonic() + timeout_s
        may_be_acked = False
        while True:
            try:
                self._table.ack(leases, generation, self._clock())
                return
            except (TableLostError, UnknownSampleError):
                if may_be_acked or self._is_lost(leases, deadline):
                    return
                raise
            except ReplayUnavailableError:
                if time.monotonic() >= deadline:
                    raise
                may_be_acked = True  # only the answer may have got lost
                time.sleep(POLL_S)

    def release(self, leases: Sequence[SampleLease], generation: int) -> None:
        """Give back leases whose samples were not used.

        Raises:
            StaleGenerationError: The trainer group has been replaced.
            UnknownSampleError: A lease is not held any more. Nothing is changed.
        """
        self._table.release(leases, generation)

    def update_priorities(self, rejections: Mapping[int, float]) -> None:
        """Note how much of the drafts for some captures' samples was rejected: what `prioritized` draws by.

        Args:
            rejections: By capture, from 0 to 1. Samples that are used up are passed over.
        """
        self._table.update_priorities(rejections)

    def close(self) -> None:
        """Close the connections."""
        self._table.close()
        self._client.close()

    def _check_signature(self) -> None:
        if self._checked:
            return
        signature = self._table.signature()
        if signature is not None and signature != self._signature:
            raise SignatureError(
                f"the replay table {self._prefix!r} holds {signature.model_dump_json()}, this reader expects "
                f"{self._signature.model_dump_json()}: both must come from the same recipe"
            )
        self._checked = signature is not None

    def _is_lost(self, leases: Sequence[SampleLease], deadline: float) -> bool:
        """Whether the table that gave these leases is no more; waits until Redis answers.

        Raises:
            ReplayUnavailableError: It does not up to the deadline.
        """
        while True:
            try:
                return any(lease.incarnation != self._table.incarnation() for lease in leases)
            except ReplayUnavailableError:
                if time.monotonic() >= deadline:
                    raise
                time.sleep(POLL_S)

    def _is_exhausted(self) -> bool:
        """Whether nothing is ready and nothing more will come."""
        info = self._table.info()
        return info.sealed and info.num_ready == 0

    def _too_late(self, count: int, timeout_s: float, captures: Sequence[int] | None) -> DeadlineError:
        info = self._table.info()
        wanted = f"captures {list(captures)}" if captures is not None else f"{count} samples"
        return DeadlineError(
            f"{wanted} were not ready in the replay table {self._prefix!r} after {timeout_s:g} s: {info.num_ready} "
            f"ready, {info.num_leased} leased, {info.num_inserting} being captured, {info.resident_bytes} of "
            f"{info.capacity_bytes} bytes resident. Look at the targets; if the buffer is full, raise replay.capacity."
        )
