"""The chunk store in shared memory: payloads in an arena (`services.replay.arena`), everything else in Redis as ever.

The replay shard is the only writer and gives away the space; it holds a lock behind the arena's last byte, so a shard
that takes over waits until the kernel has seen the one before it dead. Metadata, leases and byte accounting are those
of every table: where a chunk lies is a field of its sample's record, and a transition that ends a sample notes its
extents in a list (`P:freed`), from which the writer takes them back. A chunk is first copied, then recorded, so the
index never names bytes that are not there; chunks are recorded many at a time, with one script. Until then its space
belongs to the thread that copies, which alone gives it back: nobody can give it away under its hands, whatever becomes
of the sample.

**The index can be lost, and so can an answer of it.** Taking the index over (`arena_adopt`) is one script: it sets
the writer's token, drops the list and returns the extents of all samples. Records under an earlier token are refused,
so what was sent before and arrives later changes nothing, and no extent is freed twice; a capture whose record came too
late is made again. A writer that does not know whether the index heard it takes it over anew before it claims again. A
Redis that restarted empty has no token.

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
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import redis
from numpy.typing import NDArray
from typing_extensions import Buffer, override

from services.contracts import CaptureJob
from services.errors import ReplayError, ReplayUnavailableError, TableLostError, UnknownSampleError, WireError
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
MOST_UNRECORDED_BYTES = 64 * 1024**2
"""How far a writer runs ahead of the index: so soon does it notice that its attempt was replaced."""

MOST_UNRECORDED_CHUNKS = 256
"""The same, for the sake of the script: Lua's stack takes some thousand values."""

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
        writer = _Writer(self._writer, job)
        try:
            yield writer
            writer.flush()
        finally:
            writer.give_up()

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
            if self._identity(job) != sample:
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
        sample, extents = self._ask(job, "place")
        return sample, unpack_sample(extents.decode())

    def _identity(self, job: CaptureJob) -> bytes:
        """What it is known by."""
        return self._ask(job, "identity")[0]

    def _ask(self, job: CaptureJob, what: Literal["place", "identity"]) -> Reply:
        status, rest = self._scripts.run("arena_where", job.capture, job.attempt, what)
        if status == "GONE":
            raise refusals.missing_payload(job)
        return rest


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


@dataclass(frozen=True)
class _Copied:
    """A chunk that lies in the arena, and of which the index does not know yet."""

    index: int
    num_bytes: int
    claim: Extents


class _Writer(ChunkWriter):
    """Copies chunks at once, and has them recorded together."""

    def __init__(self, owner: _Owner, job: CaptureJob) -> None:
        self._owner = owner
        self._job = job
        self._copied: list[_Copied] = []
        self._copied_bytes = 0
        self._has_begun = False

    @override
    def write(self, index: int, payload: Buffer) -> None:
        if not self._has_begun:
            self._owner.begin(self._job)
            self._has_begun = True
        source: Bytes = np.frombuffer(memoryview(payload).cast("B"), np.uint8)
        if self._copied and index <= self._copied[-1].index:
            self.flush()  # it replaces one of them
        claim = self._owner.claim(self._job, source.nbytes)
        if claim is None:
            self.flush()  # which also tells what was freed
            claim = self._owner.wait_for_claim(self._job, index, source.nbytes)
        self._copied.append(_Copied(index, source.nbytes, claim))
        self._owner.copy(source, claim)
        self._copied_bytes += source.nbytes
        if self._copied_bytes >= MOST_UNRECORDED_BYTES or len(self._copied) >= MOST_UNRECORDED_CHUNKS:
            self.flush()

    @override
    def flush(self) -> None:
        if not self._copied:
            return
        token = self._owner.hand_over(self._job, self._copied)
        copied, self._copied, self._copied_bytes = self._copied, [], 0
        self._owner.record(token, self._job, copied)

    def give_up(self) -> None:
        """Give back the space of what was not recorded."""
        self._owner.give_back(self._copied)
        self._copied, self._copied_bytes = [], 0


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

    def begin(self, job: CaptureJob) -> None:
        """Make sure that an attempt is being inserted, and that the index knows its writer.

        Raises:
            UnknownSampleError: It is not being inserted.
        """
        while self._put(self._token_for(job), job) == "FENCED":
            pass  # Redis restarted empty, and has the next token

    def claim(self, job: CaptureJob, num_bytes: int) -> Extents | None:
        """Space for a chunk; None if there is none at the moment."""
        self._token_for(job)
        return self._space.claim(num_bytes)

    def wait_for_claim(self, job: CaptureJob, index: int, num_bytes: int) -> Extents:
        """The same, waiting while readers hold back what the index has freed."""
        complain_s = time.monotonic() + COMPLAIN_S
        while (claim := self.claim(job, num_bytes)) is None:
            self._put(self._token_for(job), job, index, num_bytes, "?")  # a refusal, or what was freed
            if (claim := self._space.claim(num_bytes)) is not None:
                break
            if time.monotonic() >= complain_s:
                complain_s += COMPLAIN_S
                self._tell(
                    f"capture {job.capture} waits for {num_bytes} bytes of shared memory: trainer ranks that have "
                    f"stopped or are very slow still read {self._space.read_bytes} bytes of freed samples, and "
                    f"captures on their way hold {self._space.claimed_bytes} bytes"
                )
            if self._stopping.wait(SPACE_POLL_S):
                raise _closed()
        return claim

    def copy(self, payload: Bytes, claim: Extents) -> None:
        """Fill claimed space."""
        offset = 0
        for start, end in claim:
            np.copyto(self._bytes[start:end], payload[offset : offset + end - start])
            offset += end - start

    def give_back(self, copied: Iterable[_Copied]) -> None:
        """Have space that is claimed free again."""
        for chunk in copied:
            self._space.give_back(chunk.claim)

    def hand_over(self, job: CaptureJob, copied: Iterable[_Copied]) -> str:
        """End the claims of chunks that are now to be recorded.

        Returns:
            The token to record them with. Whoever takes the index over after it was looked at finds their space free,
            and the record is refused: token and claims change hands in one step.
        """
        with self._lock:
            token = self._current_token(job)
            for chunk in copied:
                self._space.copied(chunk.claim)
            return token

    def record(self, token: str, job: CaptureJob, copied: Sequence[_Copied]) -> None:
        """Have the index hold chunks that were handed over, all of them or, with an error, none."""
        arguments = [text for chunk in copied for text in (chunk.index, chunk.num_bytes, pack(chunk.claim))]
        try:
            status = self._put(token, job, *arguments)
        except (WireError, UnknownSampleError):
            with self._lock:
                if self._token == token:  # otherwise the taking-over since has found them to be free
                    self._space.give_up(chunk.claim for chunk in copied)
            raise
        if status == "FENCED":
            raise ReplayUnavailableError(
                f"the index of the shared-memory arena was taken over anew while capture {job.capture} was on its way: "
                "the capture is made again"
            )

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

    def _put(self, token: str, job: CaptureJob, *chunks: int | str) -> str:
        """Have the index note chunks, or ask whether it would, and take back what was freed.

        Returns:
            "OK", or "FENCED" if the index has forgotten this writer.

        Raises:
            WireError, UnknownSampleError: It refuses.
        """
        try:
            status, rest = self._scripts.run("arena_put", token, job.capture, job.attempt, *chunks)
        except BaseException:
            with self._lock:
                self._token = ""  # whether it was heard, and what was freed, the index knows
            raise
        if refusal := refusals.refused_chunk(job, status, rest):
            raise refusal
        with self._lock:
            if self._token == token:
                if status == "FENCED":
                    self._token = ""
                else:
                    self._space.give_up(chunk for text in rest for chunk in unpack_sample(text.decode()))
            # Otherwise the taking-over since has found what was freed before it.
        return status

    def _token_for(self, job: CaptureJob) -> str:
        with self._lock:
            return self._current_token(job)

    def _current_token(self, job: CaptureJob) -> str:
        """The token to record with, after taking the index over if need be. The caller holds the lock."""
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


def _closed() -> ReplayUnavailableError:
    return ReplayUnavailableError("the replay shard is stopping: its shared-memory arena takes no more chunks")
