"""A replay table and its work queue in the memory of one process: the same answers as the Redis ones, without a server.

For tests and for trying things out. It is written from the rules, not from the scripts, so that the contract suite and
its state machine check one against the other. Threads may share it.
"""

from __future__ import annotations

import contextlib
import math
import random
import secrets
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from typing_extensions import Buffer, override

from services.contracts import CaptureJob, LeaseName, Outcome, Sample, SampleLease, TableInfo, TableSignature
from services.replay import refusals
from services.replay.protocol import CaptureQueue, ReplayTable
from services.replay.rate_limiter import LimiterState, RateLimiter
from services.replay.rules import Admission, Cleared, check_chunks, committed, resident_already, uses_of
from services.replay.selectors import Choice, Ready, Selector, priorities
from services.replay.store import ChunkReader, ChunkWriter, OneByOne


@dataclass
class _Inserting:
    """A capture in flight."""

    attempt: int
    num_bytes: int
    promise: int
    chunks: list[bytes] = field(default_factory=list)


@dataclass
class _Resident:
    """A committed sample.

    Attributes:
        sample: Its record.
        chunks: Payloads.
        order: Place in the line when it was committed.
        place: Place in the line now; None while no use of it is ready.
        promise: Uses that it promised.
        ready: The k that are neither leased nor acked.
        unacked: Uses that no ack has ended.
        weight: Of the prioritized selector.
    """

    sample: Sample
    chunks: list[bytes]
    order: int
    place: int | None
    promise: int
    ready: set[int]
    unacked: int
    weight: float

    @property
    def num_uses(self) -> int:
        return len(uses_of(self.sample.job))


@dataclass
class _Lease:
    """A lease that is held."""

    capture: int
    k: int
    deadline_s: float


@dataclass
class _Table:
    """One making of a table."""

    signature: TableSignature
    incarnation: str
    capacity_bytes: int = 0
    max_times_sampled: int = 0
    limiter: RateLimiter = field(default_factory=RateLimiter)
    selector: Selector = field(default_factory=Selector)
    generation: int = 0
    sealed: bool = False
    peak_bytes: int = 0
    wanted_bytes: int = 0
    num_places: int = 0
    num_leases: int = 0
    inserts: int = 0
    samples: int = 0
    deletes: int = 0
    inserting: dict[int, _Inserting] = field(default_factory=dict)
    residents: dict[int, _Resident] = field(default_factory=dict)
    leases: dict[str, _Lease] = field(default_factory=dict)

    @property
    def resident_bytes(self) -> int:
        in_flight = sum(capture.num_bytes for capture in self.inserting.values())
        return in_flight + sum(resident.sample.num_bytes for resident in self.residents.values())

    @property
    def num_ready_uses(self) -> int:
        return sum(len(resident.ready) for resident in self.residents.values())

    @property
    def limiter_state(self) -> LimiterState:
        return LimiterState(
            size=len(self.residents),
            promised=sum(resident.promise for resident in self.residents.values()),
            sampled=sum(resident.num_uses - len(resident.ready) for resident in self.residents.values()),
            num_inserting=len(self.inserting),
            promising=sum(capture.promise for capture in self.inserting.values()),
            is_full=self.wanted_bytes > 0 and self.resident_bytes + self.wanted_bytes > self.capacity_bytes,
            is_sealed=self.sealed,
        )

    def line(self) -> list[int]:
        """Captures with a ready use, those that fifo takes first in front."""
        places = {capture: resident.place for capture, resident in self.residents.items()}
        placed = [(place, capture) for capture, place in places.items() if place is not None]
        return [capture for _, capture in sorted(placed)]

    def next_place(self) -> int:
        self.num_places += 1
        return self.num_places

    def choose(self, draw: float) -> Choice:
        line = [Ready(capture, self.residents[capture].weight) for capture in self.line()]
        return self.selector.choose(line, draw)

    def take(self, choice: Choice, deadline_s: float) -> SampleLease:
        resident = self.residents[choice.capture]
        k = min(resident.ready)
        resident.ready.remove(k)
        resident.place = self.next_place() if resident.ready else None
        self.num_leases += 1
        self.samples += 1
        lease_id = f"{self.incarnation}.{self.num_leases}"
        self.leases[lease_id] = _Lease(choice.capture, k, deadline_s)
        job = resident.sample.job
        return SampleLease(
            lease_id=lease_id,
            use=job.capture * job.reuse + k,
            k=k,
            sample=resident.sample,
            importance=choice.importance,
        )

    def give_back(self, lease_id: str) -> int:
        """End a lease and put its use back; returns its capture."""
        held = self.leases.pop(lease_id)
        resident = self.residents[held.capture]
        resident.ready.add(held.k)
        if resident.place is None:
            resident.place = resident.order
        return held.capture

    def free(self, capture: int) -> None:
        del self.residents[capture]
        self.deletes += 1


class MemoryStore:
    """What a Redis would hold under one prefix: at most one table, its outcomes, and a work queue.

    Args:
        prefix: Its name in messages.
    """

    def __init__(self, prefix: str = "memory") -> None:
        self.prefix = prefix
        self.lock = threading.RLock()
        self.table: _Table | None = None
        self.outcomes: deque[Outcome] = deque()
        self.waiting: deque[int] = deque()
        self.jobs: dict[int, CaptureJob] = {}
        self.taken: dict[int, float] = {}

    def empty(self) -> None:
        """Forget outcomes and jobs."""
        self.outcomes.clear()
        self.waiting.clear()
        self.jobs.clear()
        self.taken.clear()

    def forget_job(self, capture: int) -> bool:
        """End a job of the work queue; whether there was one."""
        self.taken.pop(capture, None)
        return self.jobs.pop(capture, None) is not None


class _Writer(ChunkWriter):
    """Stores each chunk at once."""

    def __init__(self, put: Callable[[int, Buffer], None]) -> None:
        self._put = put

    @override
    def write(self, index: int, payload: Buffer) -> None:
        self._put(index, payload)

    @override
    def flush(self) -> None:
        pass


class MemoryTable(ReplayTable):
    """One replay table in a `MemoryStore`."""

    def __init__(self, store: MemoryStore, *, draw: Callable[[], float] = random.random) -> None:
        """Attach to a store.

        Args:
            store: What holds the table.
            draw: Where selectors take their numbers in [0, 1) from, one a use.
        """
        self._store = store
        self._draw = draw

    @override
    def create(
        self,
        capacity_bytes: int,
        signature: TableSignature,
        max_times_sampled: int,
        limiter: RateLimiter | None = None,
        selector: Selector | None = None,
    ) -> None:
        with self._store.lock:
            table = self._store.table or _Table(signature, secrets.token_hex(4))
            if table.signature != signature:
                raise refusals.other_signature(self._store.prefix, table.signature.model_dump_json(), signature)
            if table.resident_bytes > capacity_bytes:
                raise refusals.shrunk_capacity(self._store.prefix, table.resident_bytes, capacity_bytes)
            table.capacity_bytes = capacity_bytes
            table.max_times_sampled = max_times_sampled
            table.limiter = limiter or RateLimiter(samples_per_insert=max_times_sampled)
            table.selector = selector or Selector()
            self._store.table = table

    @override
    def incarnation(self) -> str | None:
        table = self._store.table
        return table.incarnation if table else None

    @override
    def generation(self) -> int | None:
        table = self._store.table
        return table.generation if table else None

    @override
    def signature(self) -> TableSignature | None:
        table = self._store.table
        return table.signature if table else None

    @override
    def admit(self, job: CaptureJob, num_bytes: int, now_s: float, *, queued: bool = False) -> Admission:
        num_uses = len(uses_of(job))
        if not num_uses or num_bytes <= 0:
            raise refusals.nothing_to_insert(job, num_uses, num_bytes)
        with self._store.lock:
            table = self._table()
            waiting = self._store.jobs.get(job.capture)
            if queued and (waiting is None or waiting.attempt != job.attempt):
                return Admission.GONE
            if num_bytes > table.capacity_bytes:
                raise refusals.too_large(job, num_bytes, table.capacity_bytes)
            if num_uses > table.max_times_sampled:
                raise refusals.too_many_uses(job, num_uses, table.max_times_sampled)
            if job.capture in table.residents:
                if self._store.forget_job(job.capture):
                    self._store.outcomes.append(resident_already(job, num_bytes))
                return Admission.KNOWN
            known = table.inserting.get(job.capture)
            if known and job.attempt <= known.attempt:
                return Admission.KNOWN
            if known:
                del table.inserting[job.capture]
            promise = table.limiter.promise(num_uses)
            if table.resident_bytes + num_bytes > table.capacity_bytes:
                table.wanted_bytes = num_bytes
                return Admission.FULL
            if not known and not table.limiter.can_insert(table.limiter_state, promise):
                return Admission.FULL
            table.inserting[job.capture] = _Inserting(job.attempt, num_bytes, promise)
            table.wanted_bytes = 0
            table.peak_bytes = max(table.peak_bytes, table.resident_bytes)
            return Admission.ADMITTED

    @override
    def open(self) -> None:
        pass  # whoever has connected reaches them

    @override
    @contextlib.contextmanager
    def writing(self, job: CaptureJob) -> Iterator[ChunkWriter]:
        yield _Writer(partial(self._put_chunk, job))

    @override
    def read_into(self, job: CaptureJob, index: int, place: Buffer) -> None:
        view = memoryview(place).cast("B")
        with self._store.lock:
            chunks = self._chunks_of(job)
        if index >= len(chunks):
            raise refusals.missing_payload(job, index)
        if len(chunks[index]) != view.nbytes:
            raise refusals.other_payload_size(job, index, len(chunks[index]), view.nbytes)
        view[:] = chunks[index]

    @override
    @contextlib.contextmanager
    def reading(self, job: CaptureJob) -> Iterator[ChunkReader]:
        yield OneByOne(self, job)

    @override
    def close(self) -> None:
        pass

    @override
    def commit(self, sample: Sample, now_s: float) -> None:
        job = sample.job
        with self._store.lock:
            table = self._table()
            check_chunks(sample, table.signature)
            resident = table.residents.get(job.capture)
            if resident and resident.sample.job.attempt == job.attempt:
                return
            capture = self._inserting(job)
            if sample.num_bytes > capture.num_bytes:
                raise refusals.unreserved_bytes(job, sample.num_bytes, capture.num_bytes)
            if len(capture.chunks) != len(sample.chunks):
                raise refusals.other_chunks(job, len(capture.chunks), len(sample.chunks))
            for index, (stored, sent) in enumerate(zip(capture.chunks, sample.chunks, strict=True)):
                if len(stored) != sent.num_bytes:
                    raise refusals.other_chunk_size(job, index, len(stored), sent.num_bytes)
            if (arrived := sum(map(len, capture.chunks))) != sample.num_bytes:
                raise refusals.missing_bytes(job, arrived, sample.num_bytes)
            del table.inserting[job.capture]
            uses, place = uses_of(job), table.next_place()
            table.residents[job.capture] = _Resident(
                sample=sample,
                chunks=capture.chunks,
                order=place,
                place=place,
                promise=table.limiter.promise(len(uses)),
                ready=set(uses),
                unacked=len(uses),
                weight=1.0,
            )
            table.inserts += 1
            self._store.outcomes.append(committed(sample))
            self._store.forget_job(job.capture)

    @override
    def abandon(self, job: CaptureJob, outcome: Outcome) -> bool:
        with self._store.lock:
            table = self._store.table
            capture = table.inserting.get(job.capture) if table else None
            if table and capture and capture.attempt == job.attempt:
                del table.inserting[job.capture]
            else:
                is_here = capture is not None or (table is not None and job.capture in table.residents)
                queued = self._store.jobs.get(job.capture)
                if is_here or queued is None or queued.attempt > job.attempt:
                    return False
            self._store.forget_job(job.capture)
            self._store.outcomes.append(outcome)
            return True

    @override
    def lease(
        self,
        *,
        rank: int,
        generation: int,
        count: int,
        now_s: float,
        lease_s: float,
        captures: Sequence[int] | None = None,
    ) -> list[SampleLease]:
        if captures is not None and len(captures) == 0:
            return []
        draws = [self._draw() for _ in range(count)] if captures is None else []
        with self._store.lock:
            table = self._current(generation)
            if captures is not None:
                return self._lease_named(table, captures, now_s + lease_s)
            state, available = table.limiter_state, table.num_ready_uses
            if not state.is_sealed:
                if count > table.limiter.largest_lease:
                    raise refusals.too_many_at_once(count, int(table.limiter.largest_lease))
                is_stuck = state.is_full and not table.leases and not table.inserting
                if available < count and not is_stuck:
                    return []
                if not table.limiter.can_sample(state, count):
                    return []
            return [table.take(table.choose(draw), now_s + lease_s) for draw in draws[:available]]

    @override
    def ack(self, leases: Iterable[LeaseName], generation: int, now_s: float) -> None:
        ids = [lease.lease_id for lease in leases]
        with self._store.lock:
            table = self._holding(ids, generation)
            for lease_id in ids:
                deadline_s = table.leases[lease_id].deadline_s
                if now_s > deadline_s:
                    raise refusals.overdue(lease_id, now_s - deadline_s)
            for lease_id in ids:
                capture = table.leases.pop(lease_id).capture
                resident = table.residents[capture]
                resident.unacked -= 1
                if resident.unacked == 0:
                    table.free(capture)

    @override
    def release(self, leases: Iterable[LeaseName], generation: int) -> None:
        ids = [lease.lease_id for lease in leases]
        with self._store.lock:
            table = self._holding(ids, generation)
            for lease_id in ids:
                table.give_back(lease_id)

    @override
    def update_priorities(self, rejections: Mapping[int, float]) -> int:
        updates = priorities(rejections)
        with self._store.lock:
            table = self._table()
            here = [capture for capture in updates if capture in table.residents]
            for capture in here:
                table.residents[capture].weight = table.selector.weight(updates[capture])
            return len(here)

    @override
    def expire(self, now_s: float) -> list[int]:
        with self._store.lock:
            table = self._table()
            overdue = sorted((held.deadline_s, lease_id) for lease_id, held in table.leases.items())
            return [table.give_back(lease_id) for deadline_s, lease_id in overdue if deadline_s < now_s]

    @override
    def set_generation(self, generation: int) -> None:
        with self._store.lock:
            table = self._table()
            if generation < table.generation:
                raise refusals.stale_generation(self._store.prefix, generation, table.generation)
            if generation == table.generation:
                return
            table.generation, table.sealed = generation, False
            for lease_id in list(table.leases):
                table.give_back(lease_id)
            for capture in table.line():
                resident = table.residents[capture]
                if resident.unacked == resident.num_uses:
                    resident.place = resident.order
                    continue
                table.free(capture)
                self._store.outcomes.append(
                    Outcome(
                        capture=capture,
                        attempt=resident.sample.job.attempt,
                        kind="failed",
                        retry=True,
                        reason=f"partly used when generation {generation} began",
                    )
                )

    @override
    def clear(self, generation: int) -> Cleared:
        with self._store.lock:
            table = self._table()
            if generation < table.generation:
                raise refusals.stale_generation(self._store.prefix, generation, table.generation)
            outcomes = self.drain_outcomes()
            self._store.empty()
            self._store.table = replace(
                table,
                generation=generation,
                incarnation=secrets.token_hex(4),
                sealed=False,
                wanted_bytes=0,
                inserts=0,
                samples=0,
                deletes=0,
                inserting={},
                residents={},
                leases={},
            )
            return Cleared(self._store.table.incarnation, outcomes)

    @override
    def seal(self) -> None:
        with self._store.lock:
            self._table().sealed = True

    @override
    def info(self) -> TableInfo:
        with self._store.lock:
            table = self._table()
            state, limiter = table.limiter_state, table.limiter
            return TableInfo(
                resident_bytes=table.resident_bytes,
                peak_bytes=table.peak_bytes,
                wanted_bytes=table.wanted_bytes,
                capacity_bytes=table.capacity_bytes,
                num_ready=len(table.line()),
                num_ready_uses=table.num_ready_uses,
                num_leased=len(table.leases),
                num_inserting=len(table.inserting),
                inserts=table.inserts,
                samples=table.samples,
                deletes=table.deletes,
                sealed=table.sealed,
                generation=table.generation,
                max_times_sampled=table.max_times_sampled,
                selector=table.selector.kind.value,
                min_size=limiter.min_size,
                samples_per_insert=limiter.samples_per_insert,
                min_diff=limiter.min_diff if math.isfinite(limiter.min_diff) else None,
                max_diff=limiter.max_diff if math.isfinite(limiter.max_diff) else None,
                difference=state.promised + state.promising - state.sampled,
                can_insert=limiter.can_insert(state, limiter.samples_per_insert),
                can_sample=limiter.can_sample(state, 1),
            )

    @override
    def drain_outcomes(self) -> list[Outcome]:
        with self._store.lock:
            drained = list(self._store.outcomes)
            self._store.outcomes.clear()
            return drained

    @override
    def destroy(self) -> None:
        with self._store.lock:
            self._store.table = None
            self._store.empty()

    def _table(self) -> _Table:
        if self._store.table is None:
            raise refusals.table_lost(self._store.prefix)
        return self._store.table

    def _current(self, generation: int) -> _Table:
        table = self._table()
        if generation != table.generation:
            raise refusals.stale_generation(self._store.prefix, generation, table.generation)
        return table

    def _holding(self, lease_ids: Sequence[str], generation: int) -> _Table:
        table, seen = self._current(generation), set[str]()
        for lease_id in lease_ids:
            if lease_id in seen or lease_id not in table.leases:
                raise refusals.not_held(lease_id)
            seen.add(lease_id)
        return table

    def _inserting(self, job: CaptureJob) -> _Inserting:
        table = self._store.table
        capture = table.inserting.get(job.capture) if table else None
        if capture and capture.attempt == job.attempt:
            return capture
        resident = table.residents.get(job.capture) if table else None
        if capture:
            raise refusals.not_being_inserted(job, "inserting", capture.attempt)
        if resident:
            raise refusals.not_being_inserted(job, "resident", resident.sample.job.attempt)
        raise refusals.not_being_inserted(job, "gone", None)

    def _put_chunk(self, job: CaptureJob, index: int, payload: Buffer) -> None:
        content = bytes(memoryview(payload).cast("B"))
        with self._store.lock:
            capture = self._inserting(job)
            if index > len(capture.chunks):
                raise refusals.missing_chunk(job, index, len(capture.chunks))
            chunks = [*capture.chunks[:index], content, *capture.chunks[index + 1 :]]
            if (total := sum(map(len, chunks))) > capture.num_bytes:
                raise refusals.overflowing_chunk(job, index, total, capture.num_bytes)
            capture.chunks = chunks

    def _chunks_of(self, job: CaptureJob) -> list[bytes]:
        table = self._store.table
        if table is None:
            return []
        resident, capture = table.residents.get(job.capture), table.inserting.get(job.capture)
        if resident and resident.sample.job.attempt == job.attempt:
            return resident.chunks
        return capture.chunks if capture and capture.attempt == job.attempt else []

    @staticmethod
    def _lease_named(table: _Table, captures: Sequence[int], deadline_s: float) -> list[SampleLease]:
        for capture, wanted in Counter(captures).items():
            if capture not in table.residents or len(table.residents[capture].ready) < wanted:
                return []
        return [table.take(Choice(capture), deadline_s) for capture in captures]


class MemoryWorkQueue(CaptureQueue):
    """The work queue in a `MemoryStore`."""

    def __init__(self, store: MemoryStore) -> None:
        """Attach to a store."""
        self._store = store

    @override
    def push(self, job: CaptureJob) -> bool:
        with self._store.lock:
            known = self._store.jobs.get(job.capture)
            if known is None:
                self._store.waiting.append(job.capture)
            if known is not None and known.attempt >= job.attempt:
                return False
            self._store.jobs[job.capture] = job
            return True

    @override
    def take(self, now_s: float, lease_s: float) -> CaptureJob | None:
        with self._store.lock:
            while self._store.waiting:
                capture = self._store.waiting.popleft()
                job = self._store.jobs.get(capture)
                if job is not None and capture not in self._store.taken:
                    self._store.taken[capture] = now_s + lease_s
                    return job
            return None

    @override
    def renew(self, job: CaptureJob, now_s: float, lease_s: float) -> bool:
        with self._store.lock:
            held = self._store.jobs.get(job.capture)
            if held is None or job.capture not in self._store.taken:
                return False
            self._store.taken[job.capture] = now_s + lease_s
            self._store.jobs[job.capture] = _with_attempt(held, max(held.attempt, job.attempt))
            return True

    @override
    def done(self, job: CaptureJob) -> bool:
        with self._store.lock:
            held = self._store.jobs.get(job.capture)
            return held is not None and held.attempt == job.attempt and self._store.forget_job(job.capture)

    @override
    def give_back(self, job: CaptureJob) -> bool:
        with self._store.lock:
            held = self._store.jobs.get(job.capture)
            if held is None or held.attempt != job.attempt or job.capture not in self._store.taken:
                return False
            self._return(job.capture)
            return True

    @override
    def expire(self, now_s: float) -> list[int]:
        with self._store.lock:
            overdue = [capture for capture, deadline_s in self._store.taken.items() if deadline_s < now_s]
            for capture in sorted(overdue, reverse=True):
                self._return(capture)
            return sorted(overdue, reverse=True)

    @override
    def size(self) -> int:
        with self._store.lock:
            return len(self._store.waiting)

    def _return(self, capture: int) -> None:
        del self._store.taken[capture]
        held = self._store.jobs[capture]
        self._store.jobs[capture] = _with_attempt(held, held.attempt + 1)
        self._store.waiting.appendleft(capture)


def _with_attempt(job: CaptureJob, attempt: int) -> CaptureJob:
    return job.model_copy(update={"attempt": attempt})
