"""Reads leased samples straight into the packed tensors that a drafter trains on.

The tensors are made once, when the leases of a micro-batch are known. Where features travel in the drafter's dtype,
context rows go from the socket (or shared memory) to their final place and are never copied; everything else goes
through one staging buffer of a chunk's size, which stays in the CPU's cache, and is converted on its way out of it.

Letters: ΣT tokens of a micro-batch, L captured layers, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from itertools import groupby

import torch
from torch import Tensor

from services.buffers import ALIGNMENT, BufferPool
from services.codec import TORCH_DTYPES, byte_view, decode_into
from services.contracts import SampleLease, TableSignature
from services.replay.store import ChunkReader
from trainer.collate import DeviceCopy, MicroBatch, packed, without_samples
from trainer.packing import ChunkPlace, pack

Reading = Callable[[SampleLease], AbstractContextManager[ChunkReader]]
"""Opens a leased sample to be read chunk by chunk; what was read counts once that context has ended well."""


class Assembler:
    """Makes micro-batches. One thread assembles, another one may release.

    Args:
        reading: Opens a sample, as `ReplayReader.reading`.
        signature: The table's.
        device: Where micro-batches go.
        dtype: Of the features there.
    """

    def __init__(
        self, reading: Reading, signature: TableSignature, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        self._reading = reading
        self._signature = signature
        self._dtype = dtype
        self._widths = (len(signature.layer_ids) * signature.hidden_size, signature.hidden_size)
        """Of context and last."""
        self._pool = BufferPool(pinned=device.type == "cuda")
        self._device_copy = DeviceCopy(device) if device.type == "cuda" else None
        self._staging = torch.empty(0, dtype=torch.uint8)

    def num_bytes(self, leases: Sequence[SampleLease]) -> int:
        """Bytes of the micro-batch that these leases make."""
        num_tokens = sum(lease.sample.job.num_tokens for lease in leases)
        return num_tokens * sum(self._widths) * self._dtype.itemsize

    def empty(self) -> MicroBatch:
        """A micro-batch that trains nothing."""
        return self._on_device(without_samples(*self._widths, self._dtype))

    def assemble(self, leases: Sequence[SampleLease], anchor_seeds: Sequence[int]) -> MicroBatch:
        """Read the samples of some leases into one micro-batch.

        Checksums and finiteness were checked once, by the shard on arrival; here only sizes are.

        Args:
            leases: At least one.
            anchor_seeds: One for each.

        Raises:
            SlipstreamError: As reading a chunk does; nothing is held then.
        """
        packing = pack([lease.sample for lease in leases])
        buffer = self._pool.take(self.num_bytes(leases) + ALIGNMENT)
        try:
            context, last = (buffer.cut(1, packing.num_tokens, width, dtype=self._dtype) for width in self._widths)
            for gap in packing.unread:
                last[0, gap.start : gap.stop].zero_()
            rows = {"context": context[0], "last": last[0]}
            for sample, places in groupby(packing.places, lambda place: place.sample):
                with self._reading(leases[sample]) as reader:
                    for place in places:
                        self._read_chunk(reader, place, rows[place.chunk.tensor])
            micro_batch = packed(leases, anchor_seeds, context, last, buffer)
        except BaseException:
            buffer.release()
            raise
        return self._on_device(micro_batch)

    def release(self, micro_batch: MicroBatch) -> None:
        """Nothing reads a micro-batch any more: its memory serves the next one."""
        if micro_batch.buffer is not None:
            micro_batch.buffer.release()

    def _on_device(self, micro_batch: MicroBatch) -> MicroBatch:
        return micro_batch if self._device_copy is None else self._device_copy.begin(micro_batch)

    def _read_chunk(self, reader: ChunkReader, place: ChunkPlace, rows: Tensor) -> None:
        """Read a chunk into its rows of a packed tensor [ΣT, width]."""
        chunk = place.chunk
        if TORCH_DTYPES[self._signature.dtype] == self._dtype and len(place.runs) == 1:
            (run,) = place.runs
            reader.read_into(place.number, byte_view(rows[run.to_row : run.to_row + run.num_rows]))
            return
        staged = byte_view(self._stage(chunk.num_bytes))
        reader.read_into(place.number, staged)
        row_bytes = chunk.num_bytes // (chunk.row_end - chunk.row_start)
        for run in place.runs:
            decode_into(
                rows[run.to_row : run.to_row + run.num_rows],
                staged[run.from_row * row_bytes : (run.from_row + run.num_rows) * row_bytes],
                self._signature.dtype,
                self._signature.hidden_size,
            )

    def _stage(self, num_bytes: int) -> Tensor:
        if len(self._staging) < num_bytes:
            self._staging = torch.empty(num_bytes, dtype=torch.uint8)
        return self._staging[:num_bytes]
