from __future__ import annotations

import random
from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from schedule_settings import schedule_settings

from services.contracts import CaptureJob, Outcome, StepLease, StepReport
from services.errors import PromptError, ReplayError, StaleGenerationError
from services.prompts.ledger import CaptureLine, Ledger, PlanHeader, audit
from services.prompts.scheduling import (
    END_EXHAUSTED,
    END_MAX_STEPS,
    END_STOPPED,
    MAX_ATTEMPTS,
    MAX_GIVEN_UP_IN_A_ROW,
    Schedule,
)


def make(num_prompts: int = 10, *, epochs: int = 1, ledger: Ledger | None = None, **changes) -> tuple[Schedule, Ledger]:
    chosen = schedule_settings(**({"accumulation": 2} | changes))
    plan = PlanHeader(num_prompts=num_prompts, epochs=epochs, reuse=chosen.reuse, seed=0, digest="")
    ledger = ledger or Ledger(plan)
    return Schedule(ledger, chosen), ledger


def job(capture: int, attempt: int = 0, reuse: int = 1, ks: tuple[int, ...] | None = None) -> CaptureJob:
    ids = (1, 2, 3)
    return CaptureJob(
        capture=capture,
        attempt=attempt,
        prompt=capture,
        epoch=0,
        reuse=reuse,
        input_ids=ids,
        loss_mask=ids,
        last_rows=(0,),
        ks=ks,
    )


def encode_all(schedule: Schedule) -> list[int]:
    """Encode whatever is wanted; returns the captures."""
    captures = []
    while (capture := schedule.next_to_encode()) is not None:
        schedule.add(job(capture, schedule.attempt(capture, at_least=0)))
        captures.append(capture)
    return captures


def pump(schedule: Schedule, room: int = 100) -> list[int]:
    """Encode and push until nothing more is wanted; returns the captures pushed."""
    pushed = []
    while True:
        jobs = [routed.job for routed in schedule.take_pushable([room])]
        pushed += [job.capture for job in jobs]
        if not encode_all(schedule) and not jobs:
            return pushed


def commit(schedule: Schedule, capture: int, attempt: int = 0) -> str:
    committed = schedule.on_outcome(Outcome(capture=capture, attempt=attempt, kind="committed"))
    assert committed is not None
    return committed.why_again


def fail(schedule: Schedule, capture: int, attempt: int = 0, *, retry: bool, reason: str = "boom") -> None:
    failed = Outcome(capture=capture, attempt=attempt, kind="failed", retry=retry, reason=reason)
    assert schedule.on_outcome(failed) is None


def report(schedule: Schedule, step: int, *by_rank: tuple[int, ...], generation: int = 7) -> None:
    for rank, uses in enumerate(by_rank):
        schedule.report(StepReport(step=step, rank=rank, generation=generation, uses=uses, num_tokens=len(uses)))


def grant(schedule: Schedule, step: int) -> StepLease:
    lease = schedule.grant(step, 7)
    assert lease is not None
    return lease


def test_step_is_granted_only_once_a_full_one_is_encoded():
    schedule, _ = make()
    for _ in range(3):
        assert schedule.grant(1, 7) is None
        schedule.add(job(schedule.next_to_encode()))
    assert schedule.grant(1, 7) is None
    schedule.add(job(schedule.next_to_encode()))
    assert grant(schedule, 1) == StepLease(step=1, num_micro_batches=2, num_uses=4)


def test_grant_is_idempotent_and_in_order():
    schedule, _ = make()
    encode_all(schedule)
    first = grant(schedule, 1)
    encode_all(schedule)
    grant(schedule, 2)
    assert schedule.grant(1, 7) == first
    with pytest.raises(ReplayError, match="step 4 was asked for, the next is 3"):
        schedule.grant(4, 7)
    with pytest.raises(ReplayError, match="step 0 was asked for, the next is 3"):
        schedule.grant(0, 7)


def test_other_generation_is_refused():
    schedule, _ = make()
    encode_all(schedule)
    with pytest.raises(StaleGenerationError, match="generation 6 is not the current one, 7"):
        schedule.grant(1, 6)
    grant(schedule, 1)
    with pytest.raises(StaleGenerationError):
        report(schedule, 1, (0,), generation=8)


def test_encoding_runs_ahead_of_a_full_queue_as_far_as_the_next_step_needs():
    # The buffer may hold less than a step: without this the grant would wait for space, and the space for the grant.
    schedule, _ = make(100)
    assert schedule.take_pushable([0]) == []
    assert encode_all(schedule) == [0, 1, 2, 3]
    grant(schedule, 1)
    assert encode_all(schedule) == [4, 5, 6, 7]
    assert [routed.job.capture for routed in schedule.take_pushable([3])] == [0, 1, 2]
    assert encode_all(schedule) == []


def test_room_in_the_queue_is_filled_ahead_of_grants():
    schedule, _ = make(100)
    pushed = []
    for _ in range(20):
        pushed += [routed.job.capture for routed in schedule.take_pushable([10 - len(pushed)])]
        encode_all(schedule)
    assert pushed == list(range(10))


def test_short_tail_is_padded():
    schedule, _ = make(7)  # 4 + 3: two micro-batches of two ranks hold three uses
    pump(schedule)
    assert grant(schedule, 1).num_micro_batches == 2
    assert grant(schedule, 2).num_micro_batches == 2
    assert grant(schedule, 3).is_end
    assert schedule.ended == END_EXHAUSTED


def test_padded_tail_has_no_more_micro_batches_than_it_needs():
    schedule, _ = make(5)
    pump(schedule)
    grant(schedule, 1)
    assert grant(schedule, 2).num_micro_batches == 1


def test_dropped_tail_is_never_captured_and_skipped_with_a_reason():
    schedule, ledger = make(7, tail="drop")
    assert pump(schedule) == [0, 1, 2, 3]
    grant(schedule, 1)
    assert grant(schedule, 2).is_end
    assert pump(schedule) == []
    assert ledger.skipped == {}  # which uses are left over shows only when the step is done
    for capture in range(4):
        commit(schedule, capture)
    assert schedule.is_complete
    report(schedule, 1, (3, 1), (0, 2))
    assert ledger.skipped == {"tail": 3}
    assert ledger.open_uses() == []


def test_max_steps_bounds_captures_and_ends():
    schedule, ledger = make(100, max_steps=2)
    assert pump(schedule) == list(range(8))
    grant(schedule, 1)
    grant(schedule, 2)
    assert grant(schedule, 3).is_end
    assert schedule.ended == END_MAX_STEPS
    assert not schedule.is_complete
    for capture in range(8):
        commit(schedule, capture)
    assert schedule.is_complete
    report(schedule, 1, (0, 1), (2, 3))
    report(schedule, 2, (4, 5), (6, 7))
    assert ledger.skipped == {}


def test_max_steps_already_done_captures_nothing():
    schedule, _ = make(100, max_steps=1)
    pump(schedule)
    grant(schedule, 1)
    report(schedule, 1, (0, 1), (2, 3))
    ledger = Ledger.resume(schedule._ledger.text(1), schedule._ledger.plan, origin="x")
    resumed, _ = make(100, max_steps=1, ledger=ledger)
    assert pump(resumed) == []
    assert resumed.is_complete
    assert grant(resumed, 2).is_end


def test_stop_ends_grants_but_captures_what_granted_steps_need():
    schedule, _ = make(100)
    encode_all(schedule)
    grant(schedule, 1)
    encode_all(schedule)
    schedule.stop()
    assert pump(schedule) == [0, 1, 2, 3]
    assert grant(schedule, 2).is_end
    assert grant(schedule, 9).is_end
    assert schedule.ended == END_STOPPED
    assert not schedule.is_complete
    for capture in range(4):
        commit(schedule, capture)
    assert schedule.is_complete


def test_failed_capture_goes_again_with_the_next_attempt():
    schedule, _ = make()
    pump(schedule)
    fail(schedule, 2, attempt=3, retry=True, reason="target died")  # the shard has tried three times by itself
    assert schedule.next_to_encode() == 2
    assert schedule.attempt(2, at_least=0) == 4
    assert schedule.attempt(2, at_least=9) == 9
    schedule.add(job(2, attempt=4))
    assert [(routed.job.capture, routed.job.attempt) for routed in schedule.take_pushable([9])] == [(2, 4)]
    assert commit(schedule, 2, attempt=4) == "target died"


def test_capture_is_skipped_after_its_last_attempt():
    schedule, ledger = make()
    pump(schedule)
    for attempt in range(MAX_ATTEMPTS):
        assert ledger.skipped == {}
        fail(schedule, 2, attempt=attempt, retry=True, reason="no answer")
        pump(schedule)
    assert ledger.skipped == {"capture failed": 1}
    assert ledger.skip_examples == {"capture failed": "no answer after 5 tries"}
    assert schedule.last_failure == "capture 2, attempt 4: no answer"


def test_commit_forgives_earlier_failures():
    schedule, ledger = make()
    pump(schedule)
    for attempt in range(0, 20, 2):
        fail(schedule, 2, attempt=attempt, retry=True)
        pump(schedule)
        commit(schedule, 2, attempt=attempt + 1)
    assert ledger.skipped == {}


def test_hopeless_capture_is_skipped_at_once_and_replaced():
    schedule, ledger = make(10, max_steps=1)
    assert pump(schedule) == [0, 1, 2, 3]
    grant(schedule, 1)
    fail(schedule, 1, retry=False, reason="too long for the target")
    assert ledger.skipped == {"capture failed": 1}
    assert pump(schedule) == [4]


def test_retry_takes_its_own_place_within_max_steps():
    schedule, _ = make(10, max_steps=1)
    assert pump(schedule) == [0, 1, 2, 3]
    fail(schedule, 2, retry=True)
    assert not schedule.is_complete
    assert pump(schedule) == [2]
    assert pump(schedule) == []


def test_tail_to_be_dropped_fills_in_for_captures_given_up():
    schedule, _ = make(7, tail="drop")
    assert pump(schedule) == [0, 1, 2, 3]
    grant(schedule, 1)
    for capture in range(4):
        fail(schedule, capture, retry=False)
    assert pump(schedule) == [4, 5, 6]


def test_uses_that_a_rank_has_reported_are_not_captured_again():
    schedule, _ = make(4, reuse=3)
    pump(schedule)
    grant(schedule, 1)
    report(schedule, 1, (0, 4))  # the other rank has not reported yet
    assert [schedule.remaining_ks(capture) for capture in (0, 1, 2)] == [(1, 2), (0, 2), (0, 1, 2)]


def test_lost_sample_is_captured_again():
    schedule, _ = make()
    pump(schedule)
    commit(schedule, 2)
    fail(schedule, 2, retry=True, reason="partly used when generation 8 began")
    assert schedule.next_to_encode() == 2


def test_outcomes_that_concern_nobody_are_passed_over():
    schedule, ledger = make(20)
    encode_all(schedule)
    assert [routed.job.capture for routed in schedule.take_pushable([2])] == [0, 1]
    commit(schedule, 0)
    grant(schedule, 1)
    report(schedule, 1, (0,), ())
    fail(schedule, 0, retry=True)  # trained already
    fail(schedule, 3, retry=False)  # not pushed yet
    fail(schedule, 19, retry=False)  # not encoded yet
    fail(schedule, 1, attempt=0, retry=True)
    pump(schedule)
    fail(schedule, 1, attempt=0, retry=False)  # attempt 1 is in flight
    assert ledger.skipped == {}
    assert schedule.next_to_encode() is None


def test_many_captures_given_up_in_a_row_end_the_run():
    schedule, _ = make(100)
    for capture in range(MAX_GIVEN_UP_IN_A_ROW - 1):
        pump(schedule)
        fail(schedule, capture, retry=False)
    pump(schedule)
    with pytest.raises(
        ReplayError, match="32 captures in a row failed for good, the last one because: buffer too small"
    ):
        fail(schedule, MAX_GIVEN_UP_IN_A_ROW - 1, retry=False, reason="buffer too small")


def test_plan_without_a_usable_conversation_is_an_error_that_says_why():
    schedule, _ = make(3)
    for _ in range(3):
        schedule.skip(schedule.next_to_encode(), "too long", "chats.jsonl:1: 9 tokens")
    assert schedule.next_to_encode() is None
    with pytest.raises(PromptError, match=r"3 uses too long \(such as chats.jsonl:1: 9 tokens\)"):
        schedule.grant(1, 7)


def test_deterministic_lease_names_captures_in_plan_order():
    schedule, _ = make(8, world_size=2, micro_batch_size=2, accumulation=2, deterministic=True)
    pump(schedule)
    # captures[rank][micro_batch]: micro-batch 0 of both ranks holds positions 0 to 3.
    assert grant(schedule, 1).captures == (((0, 1), (4, 5)), ((2, 3), (6, 7)))


def test_deterministic_tail_leaves_the_last_ranks_empty():
    schedule, _ = make(5, world_size=2, micro_batch_size=2, accumulation=2, deterministic=True)
    pump(schedule)
    assert grant(schedule, 1).captures == (((0, 1), (4,)), ((2, 3), ()))


@pytest.mark.parametrize("tail", ["pad", "drop"])
def test_deterministic_steps_hold_the_same_uses_for_any_world_size(tail):
    def steps(world_size: int, micro_batch_size: int) -> list[set[int]]:
        schedule, _ = make(
            19,
            world_size=world_size,
            micro_batch_size=micro_batch_size,
            accumulation=8 // (world_size * micro_batch_size),
            deterministic=True,
            tail=tail,
        )
        sets = []
        while True:
            encode_all(schedule)
            lease = schedule.grant(len(sets) + 1, 7)
            if lease is not None and lease.is_end:
                return sets
            if lease is not None:
                sets.append({capture for rank in lease.captures for batch in rank for capture in batch})

    expected = [set(range(8)), set(range(8, 16))] + ([{16, 17, 18}] if tail == "pad" else [])
    assert steps(1, 1) == steps(2, 1) == steps(2, 4) == steps(4, 2) == expected


def test_deterministic_run_ends_where_a_named_capture_fails_for_good():
    schedule, ledger = make(10, deterministic=True)
    pump(schedule)
    grant(schedule, 1)
    fail(schedule, 5, retry=False)  # not granted: the next ones move up
    assert ledger.skipped == {"capture failed": 1}
    assert grant(schedule, 2).captures == (((4,), (7,)), ((6,), (8,)))
    with pytest.raises(ReplayError, match=r"capture 3 failed for good \(boom\), but step 1 is granted with it"):
        fail(schedule, 3, retry=False)


def test_use_counts_as_trained_once_every_rank_has_reported():
    schedule, ledger = make()
    pump(schedule)
    grant(schedule, 1)
    report(schedule, 1, (0, 1))
    assert ledger.last_step == 0
    schedule.report(StepReport(step=1, rank=1, generation=7, uses=(3, 2), num_tokens=5))
    assert ledger.last_step == 1
    assert ledger.num_tokens_trained == 7
    assert ledger.text(1).splitlines()[1] == '{"step":1,"generation":7,"uses":[0,1,2,3],"num_tokens":7}'


def test_reports_of_the_next_step_may_overtake():
    schedule, ledger = make()
    pump(schedule)
    grant(schedule, 1)
    grant(schedule, 2)
    report(schedule, 1, (0, 1))
    report(schedule, 2, (4, 5), (6, 7))
    assert ledger.last_step == 0
    schedule.report(StepReport(step=1, rank=1, generation=7, uses=(2, 3), num_tokens=2))
    assert ledger.last_step == 2


def test_report_that_contradicts_is_refused_and_changes_nothing():
    schedule, ledger = make()
    pump(schedule)
    grant(schedule, 1)
    report(schedule, 1, (0, 1))
    report(schedule, 1, (0, 1))  # the same again

    def refused(message: str, *, step: int = 1, rank: int = 1, uses: tuple[int, ...] = (2, 3)) -> None:
        with pytest.raises(ReplayError, match=message):
            schedule.report(StepReport(step=step, rank=rank, generation=7, uses=uses, num_tokens=2))

    refused("rank 0 reports step 1 twice", rank=0)
    refused("rank 2 is not one of the 2 ranks", rank=2)
    refused("only steps 1 to 1 are under way", step=2)
    refused("use 0 in step 1, as another one does", uses=(0, 2))
    refused("use 10 is outside the plan", uses=(10,))
    refused("use 2 is named twice", uses=(2, 2))
    report(schedule, 1, (0, 1), (2, 3))
    assert ledger.num_trained == 4


def test_resumed_run_captures_everything_untrained_again_in_plan_order():
    schedule, ledger = make(10)
    pump(schedule)
    for capture in range(10):
        commit(schedule, capture)
    grant(schedule, 1)
    grant(schedule, 2)
    report(schedule, 1, (5, 0), (2, 9))
    report(schedule, 2, (1, 3), (4, 6))
    resumed, again = make(10, ledger=Ledger.resume(ledger.text(1), ledger.plan, origin="x"))
    assert pump(resumed) == [1, 3, 4, 6, 7, 8]
    assert commit(resumed, 1, attempt=1) == "not trained at step 1, where the run resumed"
    with pytest.raises(ReplayError, match="step 1 was asked for, the next is 2"):
        resumed.grant(1, 7)
    assert grant(resumed, 2).num_micro_batches == 2
    assert again.last_step == 1


def test_resumed_run_captures_only_the_uses_left_of_a_sample():
    schedule, ledger = make(4, reuse=3)
    pump(schedule)
    grant(schedule, 1)
    report(schedule, 1, (0, 4), (3, 5))
    resumed, _ = make(4, reuse=3, ledger=Ledger.resume(ledger.text(1), ledger.plan, origin="x"))
    assert [resumed.remaining_ks(capture) for capture in range(4)] == [(1, 2), (), (0, 1, 2), (0, 1, 2)]
    assert pump(resumed) == [0, 2, 3]
    assert [grant(resumed, step).num_micro_batches for step in (2, 3, 4)] == [2, 2, 0]  # 2 + 3 + 3 uses = 4 + 4


class World:
    """A queue, a buffer and trainer ranks that behave in every way they may, by a seed."""

    def __init__(
        self, seed: int, schedule: Schedule, ledger: Ledger, log: list[str], reuse: int, world_size: int
    ) -> None:
        self.random = random.Random(seed)
        self.schedule, self.ledger, self.log = schedule, ledger, log
        self.reuse, self.world_size = reuse, world_size
        self.queue: deque[CaptureJob] = deque()
        self.ready: list[int] = []
        self.step = ledger.last_step + 1
        self.over = False

    def attempts(self, capture: int) -> int:
        lines = [CaptureLine.model_validate_json(line) for line in self.log]
        return max((line.attempt + 1 for line in lines if line.capture == capture), default=0)

    def feed(self) -> None:
        self.queue.extend(routed.job for routed in self.schedule.take_pushable([3 - len(self.queue)]))
        capture = self.schedule.next_to_encode()
        if capture is None:
            return
        if capture % 7 == 3:
            self.schedule.skip(capture, "too long", "")
            return
        attempt = self.schedule.attempt(capture, at_least=self.attempts(capture))
        self.schedule.add(job(capture, attempt, self.reuse, self.schedule.remaining_ks(capture)))

    def capture(self) -> None:
        if not self.queue:
            return
        taken = self.queue.popleft()
        dice = self.random.random()
        if dice < 0.15:
            outcome = Outcome(
                capture=taken.capture, attempt=taken.attempt, kind="failed", retry=dice < 0.1, reason="dice"
            )
            assert self.schedule.on_outcome(outcome) is None
            return
        committed = self.schedule.on_outcome(
            Outcome(capture=taken.capture, attempt=taken.attempt, kind="committed", num_tokens=3, num_bytes=9)
        )
        again = self.attempts(taken.capture) > 0
        self.log.append(
            CaptureLine(
                capture=taken.capture,
                prompt=0,
                attempt=taken.attempt,
                reason=committed.why_again if again else "first",
                num_tokens=3,
                num_bytes=9,
            ).model_dump_json()
        )
        self.ready += [taken.capture * self.reuse + k for k in taken.ks]

    def train(self, micro_batch_size: int) -> None:
        lease = self.schedule.grant(self.step, 7)
        if lease is None:
            return
        if lease.is_end:
            self.over = True
            return
        wanted = lease.num_micro_batches * micro_batch_size * self.world_size
        if len(self.ready) < wanted and not self.schedule.is_complete:
            return
        self.random.shuffle(self.ready)
        uses, self.ready = self.ready[:wanted], self.ready[wanted:]
        report(self.schedule, self.step, *(tuple(uses[rank :: self.world_size]) for rank in range(self.world_size)))
        self.step += 1


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    num_prompts=st.integers(1, 25),
    epochs=st.integers(1, 2),
    reuse=st.integers(1, 3),
    world_size=st.integers(1, 3),
    micro_batch_size=st.integers(1, 2),
    accumulation=st.integers(1, 3),
    tail=st.sampled_from(["pad", "drop"]),
    max_steps=st.none() | st.integers(1, 6),
    crash_after=st.integers(1, 80),
)
def test_any_run_with_a_crash_ends_and_balances(
    seed, num_prompts, epochs, reuse, world_size, micro_batch_size, accumulation, tail, max_steps, crash_after
):
    if all(capture % 7 == 3 for capture in range(num_prompts * epochs)):
        return
    changes = {
        "reuse": reuse,
        "world_size": world_size,
        "micro_batch_size": micro_batch_size,
        "accumulation": accumulation,
        "tail": tail,
        "max_steps": max_steps,
    }
    log: list[str] = []
    schedule, ledger = make(num_prompts, epochs=epochs, **changes)
    world = World(seed, schedule, ledger, log, reuse, world_size)

    def act() -> None:
        world.random.choice([world.feed, world.feed, world.capture, lambda: world.train(micro_batch_size)])()

    try:
        for _ in range(crash_after):
            act()
        checkpoint = world.random.randint(0, ledger.last_step)
        ledger = Ledger.resume(ledger.text(checkpoint), ledger.plan, origin="x")
        schedule, _ = make(num_prompts, epochs=epochs, ledger=ledger, **changes)
        world = World(seed + 1, schedule, ledger, log, reuse, world_size)
        for _ in range(20_000):
            if world.over and schedule.is_complete:
                break
            act()
        assert world.over, "the run did not end"
        assert schedule.is_complete, "the table would never be sealed"
    except PromptError:
        assert ledger.num_trained == 0  # every capture failed: the dice can do that to a small plan
    summary = audit(ledger.text(ledger.last_step).splitlines(), log)
    assert summary.balanced, summary.problems
    assert summary.trained + summary.skipped + summary.not_reached == summary.planned
    if world.over and schedule.ended == END_EXHAUSTED:
        assert summary.not_reached == 0
    if max_steps is not None:
        assert ledger.last_step <= max_steps
