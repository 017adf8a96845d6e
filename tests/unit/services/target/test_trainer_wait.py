from __future__ import annotations

import pytest

from services.target.trainer_wait import FEWEST_STEPS, StepTime, TrainerWait, Waited

LONG_AGO_S = -1e9


def trained(window_s: float, *steps: tuple[float, float, float]) -> TrainerWait:
    wait = TrainerWait(window_s)
    for step in steps:
        wait.add(StepTime(*step))
    return wait


def test_wait_is_that_of_the_newest_steps_that_make_a_window() -> None:
    wait = trained(3.0, (10.0, 2.0, 2.0), (12.0, 2.0, 1.0), (14.0, 2.0, 0.0))
    assert wait.judge(14.0, LONG_AGO_S) == Waited(0.25, 4.0)


def test_less_than_a_window_is_not_judged() -> None:
    wait = trained(5.0, (12.0, 2.0, 1.0), (14.0, 2.0, 0.0))
    assert wait.judge(14.0, LONG_AGO_S) is None
    assert TrainerWait(5.0).judge(14.0, LONG_AGO_S) is None


def test_step_longer_than_the_window_is_judged_whole() -> None:
    assert trained(5.0, (100.0, 80.0, 60.0)).judge(100.0, LONG_AGO_S) == Waited(0.75, 80.0)


def test_steps_that_began_before_a_change_say_nothing() -> None:
    wait = trained(2.0, (10.0, 2.0, 2.0), (12.0, 2.0, 1.0))
    assert wait.judge(12.0, 10.0) == Waited(0.5, 2.0)
    assert wait.judge(12.0, 10.5) is None


def test_step_under_way_waits_for_what_exceeds_the_longest_computation() -> None:
    wait = trained(4.0, (10.0, 3.0, 1.0), (11.0, 1.0, 0.0))
    assert wait.judge(12.9, LONG_AGO_S) == Waited(0.25, 4.0), "for 2 s it may compute"
    assert wait.judge(19.0, LONG_AGO_S) == Waited(0.75, 8.0)
    assert wait.judge(19.0, 11.5) is None, "it began before the change"


def test_checkpoint_after_a_step_is_no_wait() -> None:
    wait = TrainerWait(4.0)
    wait.add(StepTime(10.0, 4.0, 1.0, is_saved=True))
    assert wait.judge(60.0, LONG_AGO_S) == Waited(0.25, 4.0)


def test_few_steps_are_kept_of_many() -> None:
    wait = TrainerWait(1.0)
    for number in range(1000):
        wait.add(StepTime(float(number), 1.0, 0.5))
    assert len(wait._steps) == FEWEST_STEPS
    assert wait.judge(999.0, LONG_AGO_S) == Waited(0.5, 1.0)


@pytest.mark.parametrize("wait_s", [2.5, 3.0])
def test_clocks_that_disagree_give_no_more_than_all(wait_s: float) -> None:
    assert trained(1.0, (10.0, 2.0, wait_s)).judge(10.0, LONG_AGO_S) == Waited(1.0, 2.0)
