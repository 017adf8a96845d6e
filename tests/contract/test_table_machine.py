"""Random operations on a table in Redis and on one in memory: every answer, every refusal and `info` must be the same.

Beside that, what must hold in both whatever happens: bytes stay below the capacity, no use is acked twice, something
can always move, and a sealed table runs empty.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from replaying import SIGNATURE, Replay, bytes_of, failed, get_chunk, make_job, make_sample, put_chunk, store

from services.contracts import CaptureJob, SampleLease
from services.errors import SlipstreamError
from services.replay.arena import Arena
from services.replay.arena_store import ArenaStore
from services.replay.audit import audit_table
from services.replay.connect import Client
from services.replay.memory_table import MemoryStore, MemoryTable, MemoryWorkQueue
from services.replay.rate_limiter import RateLimiter
from services.replay.rules import Admission, Cleared
from services.replay.selectors import Selector, SelectorKind
from services.replay.table import RedisTable
from services.replay.work import WorkQueue

CAPACITY_BYTES = 400
MOST_TOKENS = 6
LEASE_S = 10.0

CAPTURES = st.integers(0, 7)
PICKS = st.integers(0, 10**6)
"""Which of the things at hand, modulo their number."""

OUT_OF_SCOPE = ("without a job", ", its job has", "peak bytes")
"""Of an audit: captures are admitted here that never were in the work queue, and the capacity shrinks."""

RECENT = 8
"""Jobs that are picked again: what is done to older ones is mostly refused."""

LIMITERS = st.one_of(
    st.none(),
    st.builds(RateLimiter, min_size=st.integers(1, 4)),
    st.builds(
        lambda min_size, spi, more: RateLimiter.with_error_buffer(min_size, spi, spi + more),
        min_size=st.integers(1, 4),
        spi=st.integers(1, 3),
        more=st.integers(0, 3),
    ),
)
SELECTORS = st.builds(
    Selector,
    kind=st.sampled_from(SelectorKind),
    priority_exponent=st.sampled_from([0.0, 0.6, 1.0]),
    importance_exponent=st.sampled_from([0.0, 0.4, 1.0]),
)


class Held(NamedTuple):
    """One lease, as each table gave it."""

    memory: SampleLease
    redis: SampleLease


class Refused(NamedTuple):
    """An operation that raised."""

    kind: type[Exception]
    message: str


class TableMachine(RuleBasedStateMachine):
    """Two tables that are told the same."""

    client: Client
    num_examples = 70
    in_shared_memory = False
    numbers = itertools.count()

    @initialize(reuse=st.integers(1, 3), limiter=LIMITERS, selector=SELECTORS, seed=st.integers(0, 2**32))
    def begin(self, reuse: int, limiter: RateLimiter | None, selector: Selector, seed: int) -> None:
        prefix, memory = f"machine{next(self.numbers)}", MemoryStore()
        memory.prefix = prefix
        self.prefix = prefix
        self.memory = Replay(MemoryTable(memory, draw=random.Random(seed).random), MemoryWorkQueue(memory))
        self.stack = contextlib.ExitStack()
        chunks = self.stack.enter_context(self.arena_store()) if self.in_shared_memory else None
        table = RedisTable(self.client, prefix, chunks=chunks, draw=random.Random(seed).random)
        self.redis = Replay(table, WorkQueue(self.client, prefix))
        self.reuse, self.limiter, self.selector = reuse, limiter, selector
        self.both(lambda it: it.table.create(CAPACITY_BYTES, SIGNATURE, reuse, limiter, selector))
        self.now_s = 1000.0
        self.generation = 0
        self.jobs: list[CaptureJob] = []
        self.leases: list[Held] = []
        self.next_capture = 100
        self.in_flight: dict[int, CaptureJob] = {}
        """The newest admitted attempt of each capture, long since committed or abandoned or not."""
        self.acked: set[tuple[int, int]] = set()

    def teardown(self) -> None:
        if hasattr(self, "prefix"):
            self.counters_are_what_the_keys_make()
            self.something_can_always_move(2)
            self.runs_empty()
            self.counters_are_what_the_keys_make()
            self.redis.table.destroy()
            assert self.client.keys(f"{self.prefix}:*") == []
            self.stack.close()

    @contextlib.contextmanager
    def arena_store(self) -> Iterator[ArenaStore]:
        """A store with exactly the bytes that the table may hold: what is admitted must always fit."""
        with Arena(CAPACITY_BYTES) as arena:
            store = ArenaStore(self.client, self.prefix, arena.place)
            yield store
            store.close()

    # Telling both.

    def both(self, operation: Callable[[Replay], Any]) -> Any:
        """Do something to both and compare; returns the answer of the one in memory, or how both refused."""
        answers = [self.attempt(operation, replay) for replay in (self.memory, self.redis)]
        self.compare(*answers)
        return answers[0]

    @staticmethod
    def attempt(operation: Callable[[Replay], Any], replay: Replay) -> Any:
        try:
            return operation(replay)
        except SlipstreamError as error:
            return Refused(type(error), re.sub(r"lease \w+\.", "lease ", str(error)))

    def compare(self, memory: Any, redis: Any) -> None:
        if isinstance(memory, Cleared) and isinstance(redis, Cleared):
            assert memory.outcomes == redis.outcomes
            return
        assert memory == redis

    def lease_both(self, count: int, captures: list[int] | None = None) -> list[Held] | Refused:
        memory, redis = (
            self.attempt(
                lambda it: it.table.lease(
                    rank=1,
                    generation=self.generation,
                    count=count,
                    now_s=self.now_s,
                    lease_s=LEASE_S,
                    captures=captures,
                ),
                replay,
            )
            for replay in (self.memory, self.redis)
        )
        if isinstance(memory, Refused) or isinstance(redis, Refused):
            assert memory == redis
            return memory
        assert [self.without_incarnation(item) for item in memory] == [self.without_incarnation(item) for item in redis]
        held = [Held(*pair) for pair in zip(memory, redis, strict=True)]
        self.leases += held
        return held

    @staticmethod
    def without_incarnation(lease: SampleLease) -> SampleLease:
        return lease.model_copy(update={"lease_id": lease.lease_id.partition(".")[2]})

    def admit_both(self, job: CaptureJob, *, more_bytes: int = 0, queued: bool = False) -> Any:
        self.jobs.append(job)
        num_bytes = bytes_of(job) + more_bytes
        answer = self.both(lambda it: it.table.admit(job, num_bytes, self.now_s, queued=queued))
        if answer is Admission.ADMITTED:
            self.in_flight[job.capture] = job
        return answer

    def some_job(self, pick: int) -> CaptureJob:
        return self.jobs[-1 - pick % min(len(self.jobs), RECENT)]

    # Captures.

    @rule(capture=CAPTURES, tokens=st.integers(2, MOST_TOKENS), attempt=st.integers(0, 2), ks=st.integers(1, 3))
    def admit(self, capture: int, tokens: int, attempt: int, ks: int) -> None:
        job = make_job(capture, tokens=tokens, attempt=attempt, reuse=self.reuse, ks=tuple(range(ks)))
        self.admit_both(job)

    @precondition(lambda self: self.jobs)
    @rule(pick=PICKS, queued=st.booleans())
    def admit_again(self, pick: int, queued: bool) -> None:
        job = self.some_job(pick)
        self.admit_both(job, queued=queued)

    @precondition(lambda self: self.jobs)
    @rule(pick=PICKS, more=st.integers(0, 40))
    def admit_next_attempt(self, pick: int, more: int) -> None:
        old = self.some_job(pick)
        job = old.model_copy(update={"attempt": old.attempt + 1})
        self.admit_both(job, more_bytes=more)

    @precondition(lambda self: self.jobs)
    @rule(pick=PICKS, index=st.integers(0, 2), num_bytes=st.integers(1, 100))
    def put_any_chunk(self, pick: int, index: int, num_bytes: int) -> None:
        job, payload = self.some_job(pick), bytes([index + 1]) * num_bytes
        self.both(lambda it: put_chunk(it.table, job, index, payload))

    @precondition(lambda self: self.jobs)
    @rule(pick=PICKS)
    def store_and_commit(self, pick: int) -> None:
        self.commit_whole(self.some_job(pick))

    @precondition(lambda self: self.jobs)
    @rule(pick=PICKS)
    def commit_what_is_there(self, pick: int) -> None:
        sample = make_sample(self.some_job(pick))
        self.both(lambda it: it.table.commit(sample, self.now_s))

    @rule(samples=st.lists(st.tuples(st.integers(2, 4), st.integers(1, 3)), min_size=1, max_size=4))
    def insert_new(self, samples: list[tuple[int, int]]) -> None:
        for tokens, num_uses in samples:
            self.next_capture += 1
            ks = tuple(range(min(num_uses, self.reuse)))
            job = make_job(self.next_capture, tokens=tokens, reuse=self.reuse, ks=ks)
            if self.admit_both(job) is Admission.ADMITTED:
                assert self.commit_whole(job) is None

    @precondition(lambda self: self.jobs)
    @rule(pick=PICKS)
    def abandon(self, pick: int) -> None:
        job = self.some_job(pick)
        self.both(lambda it: it.table.abandon(job, failed(job)))

    def commit_whole(self, job: CaptureJob) -> Any:
        sample = make_sample(job)
        self.both(lambda it: store(it.table, job))
        inserts = self.both(lambda it: it.table.info()).inserts
        answer = self.both(lambda it: it.table.commit(sample, self.now_s))
        if self.both(lambda it: it.table.info()).inserts > inserts:
            self.acked = {use for use in self.acked if use[0] != job.capture}  # captured again, once it was used up
        return answer

    # Leases.

    @rule(count=st.integers(1, 4))
    def lease(self, count: int) -> None:
        self.lease_both(count)

    @precondition(lambda self: self.jobs)
    @rule(picks=st.lists(PICKS, min_size=1, max_size=3))
    def lease_named(self, picks: list[int]) -> None:
        self.lease_both(1, [self.some_job(pick).capture for pick in picks])

    @precondition(lambda self: self.leases)
    @rule(picks=st.lists(PICKS, min_size=1, max_size=2), stale=st.booleans())
    def ack(self, picks: list[int], stale: bool) -> None:
        self.ack_both([self.leases[pick % len(self.leases)] for pick in picks], self.generation - stale)

    @rule(count=st.integers(1, 3))
    def lease_and_ack(self, count: int) -> None:
        held = self.lease_both(count)
        if not isinstance(held, Refused):
            self.ack_both(held, self.generation)

    def ack_both(self, held: list[Held], generation: int) -> None:
        """Both refusals name the same lease, except for its table's incarnation."""
        answers = [
            self.attempt(lambda it, which=which: it.table.ack(leases_of(held, which), generation, self.now_s), replay)
            for which, replay in enumerate((self.memory, self.redis))
        ]
        self.compare(*answers)
        if answers[0] is None:
            for lease, _ in held:
                use = (lease.sample.job.capture, lease.k)
                assert use not in self.acked, f"use {use} was acked twice"
                self.acked.add(use)

    @precondition(lambda self: self.leases)
    @rule(picks=st.lists(PICKS, min_size=1, max_size=2))
    def release(self, picks: list[int]) -> None:
        held = [self.leases[pick % len(self.leases)] for pick in picks]
        answers = [
            self.attempt(lambda it, which=which: it.table.release(leases_of(held, which), self.generation), replay)
            for which, replay in enumerate((self.memory, self.redis))
        ]
        self.compare(*answers)

    @rule(seconds=st.integers(0, 12))
    def pass_time_and_expire(self, seconds: int) -> None:
        self.now_s += seconds
        self.both(lambda it: it.table.expire(self.now_s))

    @precondition(lambda self: self.jobs)
    @rule(picks=st.lists(st.tuples(PICKS, st.floats(0, 1)), min_size=1, max_size=3))
    def update_priorities(self, picks: list[tuple[int, float]]) -> None:
        rejections = {self.some_job(pick).capture: rejection for pick, rejection in picks}
        self.both(lambda it: it.table.update_priorities(rejections))

    # The whole.

    @rule(
        what=st.sampled_from(["set_generation", "clear", "seal", "create"]),
        step=st.integers(-1, 1),
        capacity_bytes=st.integers(200, CAPACITY_BYTES),
        limiter=LIMITERS,
        selector=SELECTORS,
    )
    def change_the_whole(
        self, what: str, step: int, capacity_bytes: int, limiter: RateLimiter | None, selector: Selector
    ) -> None:
        generation = self.generation + step
        if what == "seal":
            self.both(lambda it: it.table.seal())
        elif what == "create":
            if self.both(lambda it: it.table.create(capacity_bytes, SIGNATURE, self.reuse, limiter, selector)) is None:
                self.limiter = limiter
        elif not isinstance(self.both(lambda it: getattr(it.table, what)(generation)), Refused):
            if what == "clear" or step == 1:
                self.acked.clear()  # the new group may repeat what the old one used
            self.generation = generation

    # The work queue.

    @rule(capture=CAPTURES, attempt=st.integers(0, 3))
    def push(self, capture: int, attempt: int) -> None:
        job = make_job(capture, attempt=attempt, reuse=self.reuse)
        self.jobs.append(job)
        self.both(lambda it: it.work.push(job))

    @rule()
    def take(self) -> None:
        job = self.both(lambda it: it.work.take(self.now_s, LEASE_S))
        if job is not None:
            self.jobs.append(job)

    @precondition(lambda self: self.jobs)
    @rule(pick=PICKS, what=st.sampled_from(["renew", "done", "give_back"]))
    def end_job(self, pick: int, what: str) -> None:
        job = self.some_job(pick)
        if what == "renew":
            self.both(lambda it: it.work.renew(job, self.now_s, LEASE_S))
        else:
            self.both(lambda it: getattr(it.work, what)(job))

    @rule()
    def expire_jobs(self) -> None:
        self.both(lambda it: it.work.expire(self.now_s))
        self.both(lambda it: it.work.size())

    @rule()
    def drain_outcomes(self) -> None:
        self.both(lambda it: it.table.drain_outcomes())

    # What must hold.

    @invariant()
    def tables_look_alike_and_hold_no_more_than_they_may(self) -> None:
        if not hasattr(self, "prefix"):
            return
        info = self.both(lambda it: it.table.info())
        assert info.resident_bytes <= info.capacity_bytes

    def counters_are_what_the_keys_make(self) -> None:
        """Counters and keys of the table in Redis say the same."""
        problems = audit_table(self.client, self.prefix)
        assert [line for line in problems if not any(word in line for word in OUT_OF_SCOPE)] == []

    @precondition(lambda self: self.jobs)
    @rule(pick=PICKS, index=st.integers(0, 2), num_bytes=st.integers(1, 100))
    def chunks_are_alike(self, pick: int, index: int, num_bytes: int) -> None:
        job = self.some_job(pick)
        answer = self.both(lambda it: get_chunk(it.table, job, index, num_bytes))
        if isinstance(answer, Refused) and (stored := re.search(r"has (\d+) bytes", answer.message)):
            assert isinstance(self.both(lambda it: get_chunk(it.table, job, index, int(stored[1]))), bytes)

    @rule(count=st.integers(1, 5))
    def something_can_always_move(self, count: int) -> None:
        """Once all that is held is given back, the next capture is admitted, or uses are leased, if only in part."""
        self.let_go()
        info = self.both(lambda it: it.table.info())
        if info.sealed or (self.limiter and count > self.limiter.largest_lease):
            return
        self.next_capture += 1
        job = make_job(self.next_capture, tokens=3, reuse=self.reuse)
        if self.admit_both(job) is Admission.FULL:
            assert self.lease_both(count), f"neither capture nor lease of {count} can go on: {info}"

    def let_go(self) -> None:
        """End all leases and all captures in flight."""
        self.now_s += LEASE_S + 1
        self.both(lambda it: it.table.expire(self.now_s))
        for job in self.in_flight.values():
            self.both(lambda it, job=job: it.table.abandon(job, failed(job)))
        assert self.both(lambda it: it.table.info()).num_inserting == 0

    def runs_empty(self) -> None:
        """A sealed table gives every use that is left, and is empty then."""
        self.let_go()
        self.both(lambda it: it.table.seal())
        for _ in range(self.both(lambda it: it.table.info()).num_ready_uses):
            held = self.lease_both(1)
            assert held
            assert not isinstance(held, Refused)
            self.ack_both(held, self.generation)
        info = self.both(lambda it: it.table.info())
        assert (info.resident_bytes, info.num_ready, info.num_leased, info.difference) == (0, 0, 0, 0)
        assert self.lease_both(1) == []
        self.both(lambda it: it.table.drain_outcomes())


def leases_of(held: list[Held], which: int) -> list[SampleLease]:
    return [pair[which] for pair in held]


class SharedMemoryMachine(TableMachine):
    """The same with payloads in shared memory."""

    num_examples = 40
    in_shared_memory = True


@pytest.mark.parametrize("machine", [TableMachine, SharedMemoryMachine])
def test_both_tables_answer_alike_whatever_is_done_to_them(redis_client: Client, machine: type[TableMachine]) -> None:
    TableMachine.client = redis_client
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=machine.num_examples,
            stateful_step_count=50,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
        ),
    )
