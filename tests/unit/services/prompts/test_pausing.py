from __future__ import annotations

from schedule_settings import schedule_settings

from services.contracts import CaptureJob, StepLease
from services.prompts.ledger import Ledger, PlanHeader
from services.prompts.scheduling import Schedule

GENERATION = 1


def make_schedule(num_prompts: int) -> Schedule:
    settings = schedule_settings(generation=GENERATION)
    schedule = Schedule(Ledger(PlanHeader(num_prompts=num_prompts, epochs=1, reuse=1, seed=0, digest="")), settings)
    while True:
        for _, job in schedule.take_pushable([100]):
            assert job.attempt == 0
        capture = schedule.next_to_encode()
        if capture is None:
            return schedule
        schedule.add(
            CaptureJob(capture=capture, prompt=capture, epoch=0, input_ids=(1, 2), loss_mask=(1, 1), last_rows=(0,))
        )


def test_pause_holds_back_the_next_step_and_none_that_was_granted() -> None:
    schedule = make_schedule(num_prompts=8)
    first = schedule.grant(1, GENERATION)
    assert first is not None
    schedule.is_paused = True
    assert schedule.grant(1, GENERATION) == first, "the other rank still gets it"
    assert schedule.grant(2, GENERATION) is None
    assert schedule.steps_granted == 1
    schedule.is_paused = False
    assert schedule.grant(2, GENERATION) == StepLease(step=2, num_micro_batches=1, num_uses=2)


def test_stop_ends_a_paused_run() -> None:
    schedule = make_schedule(num_prompts=8)
    schedule.grant(1, GENERATION)
    schedule.is_paused = True
    schedule.stop()
    lease = schedule.grant(2, GENERATION)
    assert lease is not None
    assert lease.is_end
