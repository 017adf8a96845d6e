"""How a trainer rank gets its samples: `Leasing`, and fetching into tensors. The one module here that needs torch."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from services.codec import TORCH_DTYPES, byte_view, unpack_into
from services.contracts import SampleLease, TableSignature
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
    """[T, L·D] in the table's dtype, or float32 for fp8: the layers' features in the signature's order."""
    last_rows: Tensor
    """LongTensor [R], ascending: which rows of the sequence `last` holds."""
    last: Tensor
    """[R, D] in the same: last hidden state after the final norm."""


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
            ReplayError: The payloads are in shared memory that this process cannot reach.
        """
        super().__init__(link_shards(redis_urls, prefix), prefix, signature, clock=clock)
        try:
            for link in self._links:
                link.table.open()
        except BaseException:
            self.close()
            raise

    def fetch(self, lease: SampleLease) -> CapturedSample:
        """Read a leased sample into new tensors: for a look at one. A trainer packs many, in place (`reading`).

        Raises:
            UnknownSampleError: A chunk is gone: the lease has ended.
            WireError: A chunk has another length than its record says.
        """
        job, signature = lease.sample.job, self._signature
        rows = {
            "context": torch.empty(job.num_tokens, signature.context_row_bytes, dtype=torch.uint8),
            "last": torch.empty(len(job.last_rows), signature.last_row_bytes, dtype=torch.uint8),
        }
        with self.reading(lease) as reader:
            for index, chunk in enumerate(lease.sample.chunks):
                reader.read_into(index, byte_view(rows[chunk.tensor][chunk.row_start : chunk.row_end]))
        return CapturedSample(
            lease=lease,
            input_ids=torch.tensor(job.input_ids, dtype=torch.long),
            loss_mask=torch.tensor(job.loss_mask, dtype=torch.long),
            context=self._unpacked(rows["context"], len(signature.layer_ids) * signature.hidden_size),
            last_rows=torch.tensor(job.last_rows, dtype=torch.long),
            last=self._unpacked(rows["last"], signature.hidden_size),
        )

    def _unpacked(self, packed: Tensor, width: int) -> Tensor:
        """Rows as they travelled [R, bytes], as numbers [R, width]."""
        dtype = self._signature.dtype
        if dtype != "fp8_e4m3":
            return packed.view(TORCH_DTYPES[dtype])
        rows = torch.empty(len(packed), width, dtype=torch.float32)
        unpack_into(rows, packed, dtype, self._signature.hidden_size)
        return rows
