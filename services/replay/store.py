"""Where the payloads of samples lie: what a replay table asks of its chunk store, whatever that is.

A table's metadata, leases and byte accounting are transitions in Redis; only payloads go through a store. A store frees
nothing by itself: the transition that ends a sample does, in the same step.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

from typing_extensions import Buffer, override

from services.contracts import CaptureJob


class ChunkWriter(Protocol):
    """Stores the chunks of one admitted attempt; from `ChunkStore.writing`. One thread uses it.

    It may run ahead of the store: what a chunk is refused with is raised by this call, by a later one, or at the
    latest by `flush`. After an error the writer is of no use any more.
    """

    def write(self, index: int, payload: Buffer) -> None:
        """Store a chunk; the same chunk again replaces the first.

        Args:
            index: Number of the chunk within the sample, ascending.
            payload: Its bytes, not kept after the call.

        Raises:
            UnknownSampleError: The attempt is not being inserted: abandoned, replaced, or committed.
            WireError: More bytes than were reserved, or a chunk before it is missing.
            ReplayUnavailableError: The store does not answer.
            ReplayError: The store has no space left.
        """
        ...

    def flush(self) -> None:
        """Wait until all chunks so far are stored.

        Raises:
            SlipstreamError: As `write` does.
        """
        ...


class ChunkReader(Protocol):
    """Reads the chunks of one sample; from `ChunkStore.reading`. One thread uses it."""

    def read_into(self, index: int, place: Buffer) -> None:
        """Read one chunk to where it belongs, as `ChunkStore.read_into`; it counts once the context has ended well."""
        ...


class ChunkStore(Protocol):
    """Payloads of the samples of one table. Threads may share it."""

    def open(self) -> None:
        """Make sure that payloads can be reached from this process; else that shows with the first one.

        Raises:
            ReplayError: They cannot.
        """
        ...

    def writing(self, job: CaptureJob) -> AbstractContextManager[ChunkWriter]:
        """Store the chunks of an attempt that was admitted, and is committed after the end of the context.

        Leaving the context flushes; leaving it with an error gives up what was on its way.

        Args:
            job: The capture; its attempt must be the one admitted last, and has one writer at a time.
        """
        ...

    def read_into(self, job: CaptureJob, index: int, place: Buffer) -> None:
        """Read one chunk of an attempt to where it belongs.

        Args:
            job: The capture, with the attempt that was committed.
            index: Number of the chunk within the sample.
            place: Writable and contiguous, as long as the chunk. After an error its content is undefined.

        Raises:
            UnknownSampleError: The chunk is not, or no longer, stored.
            WireError: It has another length.
            ReplayUnavailableError: The store does not answer.
        """
        ...

    def reading(self, job: CaptureJob) -> AbstractContextManager[ChunkReader]:
        """Read several chunks of an attempt, at less cost than one by one.

        What was read is good if leaving the context raises nothing: only then is it sure that the sample was not freed
        in the meantime.

        Args:
            job: The capture, with the attempt that was committed.

        Raises:
            UnknownSampleError: The sample is not, or no longer, stored; also when the context is left.
            ReplayUnavailableError: The store does not answer; likewise.
        """
        ...

    def close(self) -> None:
        """Close the connections. Again: nothing happens."""
        ...


class OneByOne(ChunkReader):
    """The reader of a store for which several chunks cost as much as each of them alone."""

    def __init__(self, store: ChunkStore, job: CaptureJob) -> None:
        self._store = store
        self._job = job

    @override
    def read_into(self, index: int, place: Buffer) -> None:
        self._store.read_into(self._job, index, place)
