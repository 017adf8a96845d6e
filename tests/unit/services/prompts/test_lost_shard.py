"""A shard that loses what it held costs that alone: the schedule plans it again, and nothing of the others."""

from __future__ import annotations

from schedule_settings import schedule_settings

from services.contracts import CaptureJob, Outcome, RankAccount, StepReport
from services.prompts.ledger import Ledger, PlanHeader
from services.prompts.scheduling import Schedule

WHY = "Redis restarted empty"


def make(num_prompts: int = 8, **changes: object) -> Schedule:
    chosen = schedule_settings(**({"num_shards": 2} | changes))
    return Schedule(
        Ledger(PlanHeader(num_prompts=num_prompts, epochs=1, reuse=chosen.reuse, seed=0, digest="")), chosen
    )


def encode(schedule: Schedule, reuse: int = 1) -> None:
    while (capture := schedule.next_to_encode()) is not None:
        schedule.add(
            CaptureJob(
                capture=capture,
                attempt=schedule.attempt(capture, at_least=0),
                prompt=capture,
                epoch=0,
                reuse=reuse,
                input_ids=(1, 2, 3),
                loss_mask=(1, 1, 1),
                last_rows=(0,),
                ks=schedule.remaining_ks(capture),
            )
        )


def push(schedule: Schedule, rooms: tuple[int, int] = (9, 9), reuse: int = 1) -> list[tuple[int, int]]:
    """(shard, capture) of all that can be pushed."""
    routed = []
    while True:
        encode(schedule, reuse)
        more = schedule.take_pushable([room - sum(at == shard for at, _ in routed) for shard, room in enumerate(rooms)])
        routed += [(shard, job.capture) for shard, job in more]
        if not more:
            return routed


def commit(schedule: Schedule, *captures: int, attempt: int = 0) -> list[str]:
    """The reasons that are logged."""
    outcomes = (Outcome(capture=capture, attempt=attempt, kind="committed", num_bytes=30) for capture in captures)
    return [committed.why_again for committed in map(schedule.on_outcome, outcomes) if committed is not None]


def accounts(held: tuple[int, ...] = (), reports: tuple[StepReport, ...] = ()) -> list[RankAccount]:
    first = RankAccount(rank=0, generation=7, incarnations=("a", "b"), held=held, reports=reports)
    return [first, RankAccount(rank=1, generation=7, incarnations=("a", "b"))]


def report(step: int, rank: int, *uses: int) -> StepReport:
    return StepReport(step=step, rank=rank, generation=7, uses=uses, num_tokens=1)


def test_captures_of_equal_bytes_go_to_the_shards_in_turn():
    assert push(make(6)) == [(0, 0), (1, 1), (0, 2), (1, 3), (0, 4), (1, 5)]


def test_only_what_the_lost_shard_held_and_no_rank_has_is_captured_again():
    schedule = make(8)
    push(schedule)
    commit(schedule, 0, 1, 2, 3, 4)  # 6 is in flight on the shard that is lost, 5 and 7 on the other one
    schedule.grant(1, 7)
    schedule.lose({0}, accounts(held=(2,)), WHY)
    assert push(schedule) == [(0, 0), (0, 4), (0, 6)], "the lost shard has the fewest bytes now"
    assert commit(schedule, 0, 4, attempt=1) == [WHY, WHY]
    commit(schedule, 5, 7)
    assert not schedule.is_complete
    assert commit(schedule, 6, attempt=1) == [WHY]
    assert schedule.is_complete


def test_use_that_a_rank_has_reported_and_the_coordinator_not_heard_of_is_not_captured_again():
    schedule = make(4, micro_batch_size=1)
    push(schedule)
    commit(schedule, 0, 1, 2, 3)
    schedule.grant(1, 7)
    schedule.lose({0}, accounts(reports=(report(1, 0, 2),)), WHY)
    assert push(schedule) == [(0, 0)]


def test_only_the_uses_that_nobody_has_are_fed_again():
    schedule = make(4, reuse=3)
    push(schedule, reuse=3)
    commit(schedule, 0, 1, 2, 3)
    schedule.grant(1, 7)
    schedule.report(report(1, 0, 0))
    schedule.report(report(1, 1, 3))
    schedule.lose({0}, accounts(held=(1, 6, 7, 8)), WHY)
    assert schedule.remaining_ks(0) == (2,)
    assert push(schedule, reuse=3) == [(0, 0)]
    # 12 uses: 2 are trained, and a step takes 2 of the 10 that are left, however they came about.
    leases = [schedule.grant(step, 7) for step in range(2, 8)]
    assert [lease.num_uses for lease in leases if lease] == [2, 2, 2, 2, 2, 0]


def test_shard_that_is_away_gets_nothing_and_the_others_go_on():
    schedule = make(8)
    assert push(schedule, (0, 3)) == [(1, 0), (1, 1), (1, 2)]


def test_deterministic_captures_return_to_their_shard_in_plan_order_before_all_others():
    schedule = make(12, deterministic=True)
    assert push(schedule, (3, 3)) == [(0, 0), (1, 1), (0, 2), (1, 3), (0, 4), (1, 5)]
    commit(schedule, 0, 1, 2, 3)
    schedule.lose({0}, accounts(held=(0,)), WHY)
    assert push(schedule, (4, 4)) == [(0, 2), (0, 4), (0, 6), (1, 7), (0, 8), (1, 9)]


def test_named_captures_are_made_again_although_the_run_was_stopped():
    schedule = make(12, deterministic=True)
    push(schedule)
    schedule.grant(1, 7)
    schedule.grant(2, 7)
    schedule.stop()
    schedule.lose({0}, accounts(), WHY)
    assert push(schedule) == [(0, 0), (0, 2)], "4 and later ones belong to no granted step"
    assert not schedule.is_complete
    commit(schedule, *range(1, 12, 2))
    commit(schedule, 0, 2, attempt=1)
    assert schedule.is_complete
