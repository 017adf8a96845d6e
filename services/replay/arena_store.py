"""The chunk store in shared memory: payloads in an arena (`services.replay.arena`), everything else in Redis as ever.

The replay shard is the only writer and gives away the space; it holds a lock behind the arena's last byte, so a shard
that takes over waits until the kernel has seen the one before it dead. Metadata, leases and byte accounting are those
of every table: where a chunk lies is a field of its sample's record, and a transition that ends a sample notes its
extents in a list (`P:freed`), from which the writer takes them back. A chunk is first copied, then recorded, so the
index never names bytes that are not there. Until it is copied, its space belongs to the thread that copies, which
alone gives it back: nobody can give it away under its hands, whatever becomes of the sample.

**The index can be lost, and so can an answer of it.** Taking the index over (`arena_adopt`) is one script: it sets
the writer's token, drops the list and returns the extents of all samples. Records under an earlier token are refused,
so what was sent before and arrives later changes nothing, and no extent is freed twice. A writer that does not know
whether the index heard it takes it over anew before it claims again. A Redis that restarted empty has no token.

**No reader trains on bytes that were overwritten.** Two rules hold, each of which is enough to keep that from
happening:

1. *Copy, then verify.* A reader asks the index where the sample lies, copies, and asks again. The same answer proves
   that the sample was there all the time, so none of its bytes was given away; any other answer is an
   `UnknownSampleError`, and the copy is not used. The answer names incarnation and order of commit, which no other
   sample ever has.
2. *A mapped range is freed by its reader's return or death, never by time.* A reader holds a shared lock on the
   ranges it reads, from before the copy until after the verification. The writer gives away freed extents only where
   nobody has a lock: a lease that expires, a new generation or a cleared table frees the sample's record and
   accounting at once, but its bytes stay out of use while a reader, stopped in mid-copy perhaps, holds them. Only the
   reader or the kernel takes the lock away, the latter when it ends the process (`services.replay.range_locks`):
   there is no list of readers, hence none that can be lost or be wrong.

A lock that comes too late, after the range was given away, is harmless because of 1. Space that readers hold back is
missing in the arena while the accounting has it as free: a writer that needs it waits, says for what, and asks the
index meanwhile whether its own capture is still wanted. Ranks that hang are killed by the driver
(`trainer.silent_s`).
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import redis
from numpy.typing import NDArray
from typing_extensions import Buffer, override

from services.contracts import CaptureJob
from services.errors import ReplayError, ReplayUnavailableError, TableLostError
from services.replay import range_locks, refusals
from services.replay.arena import ArenaPlace, open_arena
from services.replay.arena_space import ArenaSpace
from services.replay.extents import Extent, Extents, joined, pack, unpack_sample
from services.replay.scripts import Reply, Scripts
from services.replay.store import ChunkReader, ChunkStore, ChunkWriter

logger = logging.getLogger(__name__)

TAKE_OVER_S = 30.0
"""How long the writer before this one may take to die."""

TAKE_OVER_POLL_S = 0.05
SPACE_POLL_S = 0.01
COMPLAIN_S = 10.0
"""A writer that waits so long for space says what for."""

Bytes = NDArray[np.uint8]


class ArenaStore(ChunkStore):
    """Chunks of one table in an arena of this host. Any number of processes may read; one of them writes."""

    def __init__(
        self,
        client: redis.Redis,
        prefix: str,
        place: ArenaPlace,
        *,
        tell: Callable[[str], None] = logger.warning,
        stopping: threading.Event | None = None,
    ) -> None:
        """Attach to a table. The first `writing` makes this store the arena's writer.

        Args:
            client: Of the Redis that has the table, from `connect`.
            prefix: Of the table's keys.
            place: The arena, as large as the table's capacity or larger.
            tell: Hears, for the run's events, what a writer waits for.
            stopping: Ends the wait of writers for space, as `close` does.
        """
        self._scripts = Scripts(client, prefix)
        self._place = place
        self._tell = tell
        self._descriptor = -1
        self._bytes: Bytes = np.empty(0, np.uint8)
        self._lock = threading.Lock()
        self._writer: _Owner | None = None
        self._stopping = stopping or threading.Event()

    @override
    def open(self) -> None:
        with self._lock:
            if self._descriptor < 0:
                self._bytes = _map(self._place, os.O_RDONLY, mmap.PROT_READ)
                self._descriptor = open_arena(self._place, os.O_RDONLY)

    @override
    @contextlib.contextmanager
    def writing(self, job: CaptureJob) -> Iterator[ChunkWriter]:
        with self._lock:
            if self._writer is None:
                self._writer = _Owner(self._scripts, self._place, self._tell, self._stopping)
        yield _Writer(self._writer, job)

    @override
    def read_into(self, job: CaptureJob, index: int, place: Buffer) -> None:
        with self.reading(job) as reader:
            reader.read_into(index, place)

    @override
    @contextlib.contextmanager
    def reading(self, job: CaptureJob) -> Iterator[ChunkReader]:
        self.open()
        sample, chunks = self._find(job)
        # An open file of its own: locks of the same open file would end together.
        descriptor = os.open(f"/proc/self/fd/{self._descriptor}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            for extent in joined([extent for extents in chunks for extent in extents]):
                range_locks.lock_shared(descriptor, extent)
            yield _Reader(self._bytes, job, chunks)
            if self._find(job)[0] != sample:
                raise refusals.missing_payload(job)
        finally:
            os.close(descriptor)

    @override
    def close(self) -> None:
        self._stopping.set()
        with self._lock:
            if self._writer is not None:
                self._writer.close()
                self._writer = None
            if self._descriptor >= 0:
                os.close(self._descriptor)
                self._descriptor = -1

    def _find(self, job: CaptureJob) -> tuple[bytes, list[Extents]]:
        """What the sample is known by, and where its chunks lie."""
        status, rest = self._scripts.run("arena_where", job.capture, job.attempt)
        if status == "GONE":
            raise refusals.missing_payload(job)
        return rest[0], unpack_sample(rest[1].decode())


class _Reader(ChunkReader):
    def __init__(self, arena: Bytes, job: CaptureJob, chunks: list[Extents]) -> None:
        self._arena = arena
        self._job = job
        self._chunks = chunks

    @override
    def read_into(self, index: int, place: Buffer) -> None:
        if index >= len(self._chunks):
            raise refusals.missing_payload(self._job, index)
        target: Bytes = np.frombuffer(memoryview(place).cast("B"), np.uint8)
        num_bytes = sum(extent.num_bytes for extent in self._chunks[index])
        if num_bytes != target.nbytes:
            raise refusals.other_payload_size(self._job, index, num_bytes, target.nbytes)
        offset = 0
        for start, end in self._chunks[index]:
            np.copyto(target[offset : offset + end - start], self._arena[start:end])  # lets other threads run
            offset += end - start


class _Writer(ChunkWriter):
    def __init__(self, owner: _Owner, job: CaptureJob) -> None:
        self._owner = owner
        self._job = job

    @override
    def write(self, index: int, payload: Buffer) -> None:
        self._owner.write(self._job, index, np.frombuffer(memoryview(payload).cast("B"), np.uint8))

    @override
    def flush(self) -> None:
        pass  # each chunk is recorded when it is written


class _Owner:
    """The one writer of an arena: claims space, copies, records; takes back what the index frees."""

    def __init__(
        self, scripts: Scripts, place: ArenaPlace, tell: Callable[[str], None], stopping: threading.Event
    ) -> None:
        self._scripts = scripts
        self._tell = tell
        self._stopping = stopping
        self._capacity_bytes = place.capacity_bytes
        self._descriptor = open_arena(place, os.O_RDWR)
        try:
            self._wait_for_predecessor()
            self._bytes = _map(place, os.O_RDWR, mmap.PROT_READ | mmap.PROT_WRITE)
        except BaseException:
            os.close(self._descriptor)
            raise
        self._space = ArenaSpace(place.capacity_bytes, lambda extent: range_locks.unlocked(self._descriptor, extent))
        self._lock = threading.Lock()
        self._token = ""
        """Of the last taking-over; empty when the index has to be asked anew."""

    def write(self, job: CaptureJob, index: int, payload: Bytes) -> None:
        """Store one chunk, as `ChunkWriter.write`."""
        while True:
            claim = self._claim(job, index, payload.nbytes)
            try:
                offset = 0
                for start, end in claim:
                    np.copyto(self._bytes[start:end], payload[offset : offset + end - start])
                    offset += end - start
            except BaseException:
                self._space.give_back(claim)
                raise
            self._space.copied(claim)
            if self._record(job, index, payload.nbytes, claim):
                return
            # The index was lost or taken over in between, and the claim given away: once more.

    def close(self) -> None:
        """Stop being the writer. The mapping ends with its last use."""
        os.close(self._descriptor)

    def _wait_for_predecessor(self) -> None:
        deadline = time.monotonic() + TAKE_OVER_S
        while not range_locks.try_lock_exclusive(
            self._descriptor, Extent(self._capacity_bytes, self._capacity_bytes + 1)
        ):
            if time.monotonic() >= deadline:
                raise ReplayError(
                    f"another replay shard still writes to this run's shared-memory arena after {TAKE_OVER_S:g} s: it "
                    "was replaced but its process has not ended. Kill it, or run the same command again."
                )
            if self._stopping.wait(TAKE_OVER_POLL_S):
                raise _closed()

    def _claim(self, job: CaptureJob, index: int, num_bytes: int) -> Extents:
        """Space for a chunk, waiting while readers hold back what the index has freed."""
        complain_s = time.monotonic() + COMPLAIN_S
        while True:
            self._current_token(job)
            if (claim := self._space.claim(num_bytes)) is not None:
                return claim
            self._ask(job, index, num_bytes)
            if (claim := self._space.claim(num_bytes)) is not None:
                return claim
            if time.monotonic() >= complain_s:
                complain_s += COMPLAIN_S
                self._tell(
                    f"capture {job.capture} waits for {num_bytes} bytes of shared memory: trainer ranks that have "
                    f"stopped or are very slow still read {self._space.read_bytes} bytes of freed samples"
                )
            if self._stopping.wait(SPACE_POLL_S):
                raise _closed()

    def _record(self, job: CaptureJob, index: int, num_bytes: int, copied: Extents) -> bool:
        """Have the index hold a chunk; False if it has forgotten this writer."""
        token = self._current_token(job)
        status, rest = self._put(token, job, index, num_bytes, pack(copied), 1)
        if status not in ("OK", "FENCED"):
            with self._lock:
                if self._token == token:  # otherwise the taking-over since has found them to be free
                    self._space.give_up([copied])
        _check_put(job, index, status, rest)
        return status == "OK"

    def _ask(self, job: CaptureJob, index: int, num_bytes: int) -> None:
        """Raise what a chunk would be refused with, and take back what was freed."""
        status, rest = self._put(self._current_token(job), job, index, num_bytes, "", 0)
        _check_put(job, index, status, rest)

    def _put(
        self, token: str, job: CaptureJob, index: int, num_bytes: int, extents: str, is_there: int
    ) -> tuple[str, Reply]:
        try:
            status, rest = self._scripts.run(
                "arena_put", token, job.capture, job.attempt, index, num_bytes, extents, is_there
            )
        except BaseException:
            with self._lock:
                self._token = ""  # whether it was heard, and what was freed, the index knows
            raise
        with self._lock:
            if self._token == token:
                if status == "FENCED":
                    self._token = ""
                elif status == "OK":
                    self._space.give_up(chunk for text in rest for chunk in unpack_sample(text.decode()))
            # Otherwise the taking-over since has found what was freed before it.
        return status, rest

    def _current_token(self, job: CaptureJob) -> str:
        """The token to record with, after taking the index over if need be."""
        with self._lock:
            if not self._token:
                token = secrets.token_hex(8)
                try:
                    _, rest = self._scripts.run("arena_adopt", token)
                except TableLostError:
                    raise refusals.not_being_inserted(job, "gone", None) from None
                if int(rest[0]) > self._capacity_bytes:
                    raise ReplayError(
                        f"the replay table may hold {int(rest[0])} bytes, its shared-memory arena "
                        f"{self._capacity_bytes}: both must come from the same recipe"
                    )
                self._space.rebuild(chunk for text in rest[1:] for chunk in unpack_sample(text.decode()))
                self._token = token
            return self._token


def _map(place: ArenaPlace, flags: int, protection: int) -> Bytes:
    # The mapping keeps the open file that it was made from: not one that is to be closed for its locks to end.
    descriptor = open_arena(place, flags)
    try:
        return np.frombuffer(mmap.mmap(descriptor, place.capacity_bytes, prot=protection), np.uint8)
    finally:
        os.close(descriptor)


def _check_put(job: CaptureJob, index: int, status: str, rest: Reply) -> None:
    """Raise what a chunk is refused with."""
    if status == "OVERFLOW":
        raise refusals.overflowing_chunk(job, index, int(rest[0]), int(rest[1]))
    if status == "GAP":
        raise refusals.missing_chunk(job, index, int(rest[0]))
    if status == "STALE":
        raise refusals.stale_attempt(job, rest)


def _closed() -> ReplayUnavailableError:
    return ReplayUnavailableError("the replay shard is stopping: its shared-memory arena takes no more chunks")
