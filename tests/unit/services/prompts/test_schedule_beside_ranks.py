"""A schedule that begins anew beside ranks at work: from the ledger, and what the ranks say they hold and have done."""

from __future__ import annotations

import random
from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from schedule_settings import schedule_settings

from services.contracts import (
    CaptureJob,
    Outcome,
    RankAccount,
    Sample,
    SampleLease,
    StepLease,
    StepReport,
)
from services.errors import ReplayError
from services.prompts.ledger import CaptureLine, Ledger, PlanHeader, audit
from services.prompts.records import CoordinatorSettings
from services.prompts.scheduling import END_EXHAUSTED, Schedule
from services.replay.links import shard_of
from trainer.account import Account

GENERATION = 7


def make_ledger(num_prompts: int, reuse: int = 1) -> Ledger:
    return Ledger(PlanHeader(num_prompts=num_prompts, epochs=1, reuse=reuse, seed=0, digest=""))


def make_job(capture: int, attempt: int, reuse: int, ks: tuple[int, ...] | None) -> CaptureJob:
    return CaptureJob(
        capture=capture,
        attempt=attempt,
        prompt=capture,
        epoch=0,
        reuse=reuse,
        input_ids=(1, 2, 3),
        loss_mask=(1, 1, 1),
        last_rows=(0, 1),
        ks=ks,
    )


def account(rank: int, **entries: object) -> RankAccount:
    return RankAccount.model_validate({"rank": rank, "generation": GENERATION, "incarnations": ("b",)} | entries)


def step_report(step: int, rank: int, *uses: int) -> StepReport:
    return StepReport(step=step, rank=rank, generation=GENERATION, uses=uses, num_tokens=len(uses))


def pump(schedule: Schedule) -> list[CaptureJob]:
    """Encode and push until nothing more is wanted."""
    pushed: list[CaptureJob] = []
    while True:
        jobs = [routed.job for routed in schedule.take_pushable([100])]
        pushed += jobs
        capture = schedule.next_to_encode()
        if capture is None and not jobs:
            return pushed
        if capture is not None:
            schedule.add(make_job(capture, schedule.attempt(capture, at_least=9), 1, schedule.remaining_ks(capture)))


def test_what_ranks_hold_is_not_captured_again_and_what_they_did_is_trained():
    ledger = make_ledger(8)
    lease = StepLease(step=2, num_micro_batches=1, num_uses=2)
    accounts = [
        account(0, reports=(step_report(1, 0, 0),), leases=(lease,), held=(2,)),
        account(1, reports=(step_report(1, 1, 1), step_report(2, 1, 3))),
    ]
    schedule = Schedule(ledger, schedule_settings(), accounts)
    assert ledger.last_step == 1
    assert ledger.has_trained((0, 1))
    assert [job.capture for job in pump(schedule)] == [4, 5, 6, 7]
    assert schedule.grant(2, GENERATION) == lease
    schedule.report(step_report(2, 0, 2))
    assert ledger.last_step == 2
    assert [lease and lease.num_uses for lease in (schedule.grant(step, GENERATION) for step in (3, 4))] == [2, 2]
    end = schedule.grant(5, GENERATION)
    assert end is not None
    assert (end.is_end, end.end) == (True, END_EXHAUSTED)


def test_the_use_that_a_rank_has_not_read_is_captured_again():
    schedule = Schedule(make_ledger(2, reuse=2), schedule_settings(reuse=2), [account(0, held=(0,)), account(1)])
    jobs = pump(schedule)
    assert [(job.capture, job.ks, job.attempt) for job in jobs] == [(0, (1,), 9), (1, (0, 1), 9)]


def test_end_that_one_rank_was_told_holds_for_the_others():
    end = StepLease(step=1, num_micro_batches=0, end="stopped")
    schedule = Schedule(make_ledger(8), schedule_settings(), [account(0, leases=(end,)), account(1)])
    lease = schedule.grant(1, GENERATION)
    assert lease is not None
    assert (lease.is_end, lease.end) == (True, "stopped")


def test_account_that_does_not_reach_back_to_the_ledger_is_refused():
    accounts = [account(0, reports=(step_report(3, 0, 4),)), account(1)]
    with pytest.raises(ReplayError, match="rank 0 begins at step 3, the ledger ends at step 0"):
        Schedule(make_ledger(8), schedule_settings(), accounts)


def test_deterministic_grants_go_on_with_the_captures_that_no_lease_names():
    lease = StepLease(step=1, num_micro_batches=1, num_uses=2, captures=(((0,),), ((1,),)))
    accounts = [account(0, leases=(lease,), held=(0,)), account(1)]
    schedule = Schedule(make_ledger(4), schedule_settings(deterministic=True), accounts)
    assert [job.capture for job in pump(schedule)] == [1, 2, 3]
    granted = schedule.grant(2, GENERATION)
    assert granted is not None
    assert granted.captures == (((2,),), ((3,),))


class Rank:
    """One rank: takes leases ahead, reads samples, reports when the group's step is done; keeps its account."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.account = Account(number, GENERATION)
        self.leases: deque[StepLease] = deque()
        self.held: deque[tuple[int, ...]] = deque()
        """Micro-batches in memory."""
        self.unsent: list[StepReport] = []
        self.next_step = 1
        self.is_over = False


class World:
    """Queues, tables and ranks that behave in every way they may; shards and schedule are lost now and then."""

    def __init__(self, seed: int, settings: CoordinatorSettings, num_prompts: int) -> None:
        self.random, self.settings = random.Random(seed), settings
        self.ledger = make_ledger(num_prompts, settings.reuse)
        self.schedule = Schedule(self.ledger, settings)
        self.log: list[str] = []
        self.ranks = [Rank(number) for number in range(settings.world_size)]
        self.life = 0
        self.incarnations = [f"{shard}/0" for shard in range(settings.num_shards)]
        self.empty: set[int] = set()
        """Shards that were lost and wait for the ranks' accounts."""
        self.saved_steps, self.saved_texts = [0], [self.ledger.text(0)]
        self._empty()

    def _empty(self) -> None:
        shards = range(self.settings.num_shards)
        self.queues: list[deque[CaptureJob]] = [deque() for _ in shards]
        self.ready: list[list[tuple[int, CaptureJob]]] = [[] for _ in shards]
        self.outcomes: list[list[Outcome]] = [[] for _ in shards]
        self.empty = set()

    def lose_all(self) -> None:
        """The coordinator was killed: it has only the newest checkpoint's ledger, and clears all shards."""
        self._empty()
        self.life += 1
        self.incarnations = [f"{shard}/{self.life}" for shard in range(self.settings.num_shards)]
        self.ledger = Ledger.resume(self.saved_texts[-1], self.ledger.plan, origin="x")
        self.schedule = Schedule(self.ledger, self.settings, self._accounts(), "lost")

    def lose_shard(self) -> None:
        """A Redis restarts empty."""
        shard = self.random.randrange(self.settings.num_shards)
        self.queues[shard].clear()
        self.ready[shard].clear()
        self.outcomes[shard].clear()
        self.life += 1
        self.incarnations[shard] = f"{shard}/{self.life}"
        self.empty.add(shard)

    def recapture(self) -> None:
        """All ranks have given their accounts, some time after the loss."""
        if self.empty:
            self.drain()
            self.life += 1
            self.schedule.lose(self.empty, self._accounts(), "lost")
            self.empty = set()

    def _accounts(self) -> list[RankAccount]:
        accounts = [rank.account.answer(tuple(self.incarnations)) for rank in self.ranks]
        for note in (note for one in accounts for note in one.samples):
            if note.attempt not in self._attempts(note.capture):
                self._log(note.capture, note.attempt)
        return accounts

    def save(self) -> None:
        """Every rank is between two steps: a checkpoint."""
        if any(rank.unsent for rank in self.ranks) or self.ledger.last_step == self.saved_steps[-1]:
            return
        self.recapture()  # a ledger is given only once the log has all of its captures
        self.drain()
        self.saved_steps.append(self.ledger.last_step)
        self.saved_texts.append(self.ledger.text(self.ledger.last_step))
        for rank in self.ranks:
            rank.account.saved(self.ledger.last_step)

    def feed(self) -> None:
        rooms = [0 if shard in self.empty else 3 - len(queue) for shard, queue in enumerate(self.queues)]
        for shard, job in self.schedule.take_pushable(rooms):
            assert not self.settings.deterministic or shard == shard_of(job.capture, self.settings.num_shards)
            self.queues[shard].append(job)
        capture = self.schedule.next_to_encode()
        if capture is None:
            return
        if capture % 7 == 3:
            self.schedule.skip(capture, "too long", "")
            return
        attempt = self.schedule.attempt(capture, at_least=1000 * self.life)
        self.schedule.add(make_job(capture, attempt, self.settings.reuse, self.schedule.remaining_ks(capture)))

    def capture(self) -> None:
        shard = self.random.randrange(self.settings.num_shards)
        if not self.queues[shard]:
            return
        job = self.queues[shard].popleft()
        if self.random.random() < 0.1 and not self.settings.deterministic:
            failed = Outcome(capture=job.capture, attempt=job.attempt, kind="failed", retry=True, reason="dice")
            assert self.schedule.on_outcome(failed) is None
            return
        committed = Outcome(capture=job.capture, attempt=job.attempt, kind="committed", num_tokens=3, num_bytes=9)
        self.outcomes[shard].append(committed)
        self.ready[shard] += [(k, job) for k in job.ks or ()]

    def drain(self) -> None:
        for outcomes in self.outcomes:
            for outcome in outcomes:
                assert self.schedule.on_outcome(outcome) is not None
                self._log(outcome.capture, outcome.attempt)
            outcomes.clear()

    def prefetch(self) -> None:
        rank = self.random.choice(self.ranks)
        if not rank.is_over and len(rank.leases) < 2:
            lease = self.schedule.grant(rank.next_step, GENERATION)
            if lease is None:
                return
            rank.account.grant(lease)
            rank.is_over = lease.is_end
            if not lease.is_end:
                rank.leases.append(lease)
                rank.next_step += 1
        passes = [
            None if lease.captures is None else lease.captures[rank.number][number]
            for lease in rank.leases
            for number in range(lease.num_micro_batches)
        ]
        if len(rank.held) == len(passes):
            return
        leases = self._take(passes[len(rank.held)])
        if leases is not None and rank.account.hold(leases):
            rank.held.append(tuple(lease.use for lease in leases))

    def _take(self, captures: tuple[int, ...] | None) -> list[SampleLease] | None:
        """A micro-batch's leases, from whatever shards have them; None if it is not ready."""
        places = [(shard, k, job) for shard, ready in enumerate(self.ready) for k, job in ready]
        size = self.settings.micro_batch_size
        if captures is None:
            if len(places) < size and not (self.schedule.is_complete and not self.empty):
                return None
            self.random.shuffle(places)
            chosen = places[:size]
        else:
            by_capture = {job.capture: (shard, k, job) for shard, k, job in places}
            if not all(capture in by_capture for capture in captures):
                return None
            chosen = [by_capture[capture] for capture in captures]
        for shard, k, job in chosen:
            self.ready[shard].remove((k, job))
        return [self._lease(shard, k, job) for shard, k, job in chosen]

    def train(self) -> None:
        if any(rank.unsent or not rank.leases for rank in self.ranks):
            return
        step, needed = self.ranks[0].leases[0].step, self.ranks[0].leases[0].num_micro_batches
        if any(len(rank.held) < needed for rank in self.ranks):
            return
        for number, rank in enumerate(self.ranks):
            rank.leases.popleft()
            uses = tuple(use for _ in range(needed) for use in rank.held.popleft())
            rank.unsent.append(step_report(step, number, *uses))
            rank.account.report(rank.unsent[-1])

    def send(self) -> None:
        rank = self.random.choice(self.ranks)
        if rank.unsent:
            self.schedule.report(rank.unsent.pop())

    @property
    def is_over(self) -> bool:
        return all(rank.is_over and not rank.leases and not rank.unsent for rank in self.ranks)

    def _lease(self, shard: int, k: int, job: CaptureJob) -> SampleLease:
        sample = Sample(job=job, chunks=(), num_bytes=9, target="x")
        use = job.capture * self.settings.reuse + k
        return SampleLease(lease_id=f"{self.incarnations[shard]}.{use}", use=use, k=k, sample=sample)

    def _attempts(self, capture: int) -> list[int]:
        lines = [CaptureLine.model_validate_json(line) for line in self.log]
        return [line.attempt for line in lines if line.capture == capture]

    def _log(self, capture: int, attempt: int) -> None:
        why = "lost" if self._attempts(capture) else "first"
        line = CaptureLine(capture=capture, prompt=0, attempt=attempt, reason=why, num_tokens=3, num_bytes=9)
        self.log.append(line.model_dump_json())


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    num_prompts=st.integers(4, 25),
    reuse=st.integers(1, 3),
    world_size=st.integers(1, 3),
    micro_batch_size=st.integers(1, 2),
    accumulation=st.integers(1, 2),
    tail=st.sampled_from(["pad", "drop"]),
    max_steps=st.none() | st.integers(1, 6),
    num_shards=st.integers(1, 3),
    deterministic=st.booleans(),
)
def test_any_run_that_loses_shards_and_coordinator_ends_and_balances(
    seed, num_prompts, reuse, world_size, micro_batch_size, accumulation, tail, max_steps, num_shards, deterministic
):
    reuse = 1 if deterministic else reuse
    chosen = schedule_settings(
        num_shards=num_shards,
        deterministic=deterministic,
        reuse=reuse,
        world_size=world_size,
        micro_batch_size=micro_batch_size,
        accumulation=accumulation,
        tail=tail,
        max_steps=max_steps,
    )
    world = World(seed, chosen, num_prompts)
    acts = [
        *(world.feed, world.capture, world.drain, world.prefetch, world.prefetch, world.train, world.send, world.save),
        world.recapture,
    ]
    for number in range(20_000):
        if world.is_over:
            break
        if number < 600 and world.random.random() < 0.02:
            world.random.choice([world.lose_shard, world.lose_all])()
        world.random.choice(acts)()
    assert world.is_over, "the run did not end"
    world.save()
    ledger = world.ledger
    summary = audit(ledger.text(ledger.last_step).splitlines(), world.log)
    assert summary.balanced, summary.problems
    assert summary.trained + summary.skipped + summary.not_reached == summary.planned
    if world.schedule.ended == END_EXHAUSTED:  # a coordinator that began after END does not look for the useless again
        assert all(use // reuse % 7 == 3 for use in ledger.open_uses())
    if max_steps is not None:
        assert ledger.last_step <= max_steps
