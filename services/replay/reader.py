"""How a trainer rank gets its samples: `Leasing`, and fetching into tensors. The one module here that needs torch."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from services.codec import TORCH_DTYPES, byte_view
from services.contracts import SampleLease, TableSignature
from services.errors import ReplayUnavailableError, TableLostError, UnknownSampleError
from services.replay.leasing import Leasing
from services.replay.links import link_shards


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


class ReplayReader(Leasing):
    """One rank's access to the tables: it leases from them, and reads what it leased."""

    def __init__(
        self,
        redis_urls: str | Sequence[str],
        prefix: str,
        signature: TableSignature,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Connect.

        Args:
            redis_urls: The Redis of each shard; a text alone is that of a single one.
            prefix: Of the tables' keys.
            signature: What the rank expects to read.
            clock: Seconds, shared with the shards.

        Raises:
            ReplayUnavailableError: A Redis does not answer.
        """
        super().__init__(link_shards(redis_urls, prefix), prefix, signature, clock=clock)
        self._dtype = TORCH_DTYPES[signature.dtype]

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
                if not self.are_lost(leases, deadline):
                    raise
            else:
                if hold(leases):
                    return samples
            self.drop(leases, generation)  # those of tables that still stand

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
            self.read_into(lease, index, place)
        return CapturedSample(
            lease=lease,
            input_ids=torch.tensor(job.input_ids, dtype=torch.long),
            loss_mask=torch.tensor(job.loss_mask, dtype=torch.long),
            context=context,
            last_rows=torch.tensor(job.last_rows, dtype=torch.long),
            last=last,
        )
