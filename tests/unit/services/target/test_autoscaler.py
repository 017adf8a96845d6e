"""The autoscaler over hours of made-up load, and the rules that hold at every moment of them."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from simulated_run import SimulatedRun

from services.target.autoscaler import MOST_RETRY_COOLDOWNS, Autoscaler, Decision, Observation
from services.target.config import AutoscaleConfig
from services.target.trainer_wait import StepTime

HOUR_S = 3600.0
MOST = AutoscaleConfig(max=16)


def simulate(hours: float, config: AutoscaleConfig = MOST, **settings: Any) -> SimulatedRun:
    run = SimulatedRun(config, **settings)
    run.run(hours * HOUR_S)
    return run


# Hours of load


@pytest.mark.parametrize("rate", [8.0, 30.5, 35.0, 39.5, 115.0])
@pytest.mark.parametrize("replicas", [1, 16])
def test_steady_load_gets_the_targets_that_it_needs(rate: float, replicas: int) -> None:
    run = simulate(4, trainer_rate=lambda now_s: rate, replicas=replicas)
    needed = math.ceil(rate / run.target_rate)
    assert all(needed - 1 <= number <= needed + 2 for time_s, number in run.numbers if time_s > 2 * HOUR_S)
    assert needed - 1 <= run.num_serving <= needed + 1
    assert run.waited(2 * HOUR_S) < 0.03
    for hour in (1, 2, 3):
        assert len(run.scalings(hour * HOUR_S, (hour + 1) * HOUR_S)) <= 4


def test_starving_trainer_gets_several_targets_within_minutes() -> None:
    run = simulate(0.25, trainer_rate=lambda now_s: 115.0)
    assert run.scalings()[:3] == [2, 4, 8], "at most twice as many at a time"
    assert run.num_serving >= 10
    assert run.waited(10 * 60.0) < 0.1


def test_load_between_two_numbers_makes_targets_come_and_go_ever_more_rarely() -> None:
    run = simulate(24, trainer_rate=lambda now_s: 33.0)
    retried_every_s = MOST_RETRY_COOLDOWNS * run.config.down_cooldown_s
    assert 2 <= len(run.scalings(12 * HOUR_S)) <= 2 * 12 * HOUR_S / retried_every_s + 1
    assert run.waited(HOUR_S) < 0.03


def test_load_that_rises_and_falls_is_followed() -> None:
    run = simulate(4, trainer_rate=lambda now_s: 75.0 if HOUR_S <= now_s < 2 * HOUR_S else 25.0)
    at = dict(run.numbers)
    assert at[0.95 * HOUR_S] in (2, 3)
    assert at[1.5 * HOUR_S] in (7, 8, 9)
    assert at[3.9 * HOUR_S] in (2, 3)
    assert run.waited(1.4 * HOUR_S, 2 * HOUR_S) < 0.05


@pytest.mark.parametrize("changes", [{"noise": 0.8}, {"burst_s": 5.0}, {"step_samples": 2000}, {"load_s": 600.0}])
def test_noise_bursts_long_steps_and_slow_loading_are_borne(changes: dict[str, float]) -> None:
    run = simulate(6, trainer_rate=lambda now_s: 35.0, **changes)
    assert 3 <= run.num_serving <= 5
    assert run.waited(2 * HOUR_S) < 0.05
    assert len(run.scalings(2 * HOUR_S)) <= 12


def test_nothing_is_asked_for_while_targets_load() -> None:
    run = simulate(1, trainer_rate=lambda now_s: 115.0, load_s=900.0)
    times_s = [time_s for time_s, decision in run.decisions if decision.targets is not None]
    assert len(times_s) >= 2
    assert all(later - earlier > 720.0 for earlier, later in pairwise(times_s))


def test_target_that_restarts_is_waited_for() -> None:
    run = simulate(1, AutoscaleConfig(max=16, down_cooldown_s=4 * HOUR_S), trainer_rate=lambda now_s: 35.0)
    before = list(run.decisions)
    run.kill()
    run.run(1.5 * HOUR_S)
    assert run.waited(HOUR_S, HOUR_S + 120.0) > 0.05
    assert run.decisions == before


def test_failed_targets_are_replaced_and_those_that_never_load_ever_more_rarely() -> None:
    run = simulate(4, trainer_rate=lambda now_s: 35.0, is_broken=lambda now_s: HOUR_S < now_s < 3 * HOUR_S)
    assert run.num_serving == 4
    run = simulate(8, trainer_rate=lambda now_s: 35.0, is_broken=lambda now_s: True)
    assert run.num_serving == 1
    assert len(run.scalings(HOUR_S)) < 2 * 8


def test_targets_that_do_not_help_are_asked_for_ever_more_rarely() -> None:
    run = simulate(2, trainer_rate=lambda now_s: 150.0, target_rate=30.0, replicas=4, capacity=40.0, noise=0.6)
    assert len(run.scalings(0.5 * HOUR_S)) <= 5, "a buffer for a quarter of a second is what makes it wait"


def test_bounds_hold_and_the_upper_one_is_named_once() -> None:
    run = simulate(4, AutoscaleConfig(min=2, max=4), trainer_rate=lambda now_s: 200.0, replicas=2)
    assert run.scalings() == [4]
    (notice,) = run.notices()
    assert notice.endswith("but all 4 targets that target.autoscale.max allows are there")
    run = simulate(4, AutoscaleConfig(min=2, max=4), trainer_rate=lambda now_s: 1.0, replicas=4)
    assert run.scalings() == [3, 2]


def test_missing_resource_is_named_once_and_no_more_targets_are_asked_for() -> None:
    run = simulate(2, trainer_rate=lambda now_s: 75.0, places=3)
    assert run.scalings() == [2, 4]
    (notice,) = run.notices()
    assert notice.endswith("but no more targets are asked for while 1 targets wait for a GPU")
    run.places = 16
    for target in run.targets:
        target.serves_at_s = min(target.serves_at_s, run.now_s + 60.0)
    run.run(4 * HOUR_S)
    assert run.num_serving in (7, 8, 9), "the resource has come, and the autoscaler goes on"


def test_pending_target_that_is_not_missed_any_more_is_given_up() -> None:
    run = simulate(4, trainer_rate=lambda now_s: 75.0 if now_s < HOUR_S else 15.0, places=3)
    assert run.scalings(HOUR_S)[0] == 3
    assert run.num_serving in (1, 2)


def test_paused_run_is_left_alone() -> None:
    run = simulate(1, trainer_rate=lambda now_s: 35.0)
    before = list(run.decisions)
    run.is_paused = True
    run.run(3 * HOUR_S)
    run.is_paused = False
    run.run(3 * HOUR_S + 120.0)
    assert run.decisions == before, "the full buffer of a pause is no surplus of targets"


def test_run_that_is_about_to_end_gets_no_more_targets() -> None:
    run = SimulatedRun(MOST, trainer_rate=lambda now_s: 35.0)
    run.run(160.0)  # one request has shown how long loading takes
    assert run.scalings() == [2]
    run.left_s = 100.0
    run.run(HOUR_S)
    assert run.scalings() == [2]
    run.left_s = 1000.0
    run.run(2 * HOUR_S)
    assert run.scalings()[1] == 4


# The same runs each time: what noise does in one of ten thousand is no defect. To shrink hours takes minutes.
@settings(max_examples=30, derandomize=True, phases=[Phase.explicit, Phase.generate])
@given(
    rate=st.floats(1.0, 150.0),
    target_rate=st.floats(3.0, 30.0),
    replicas=st.integers(1, 8),
    load_s=st.floats(0.0, 600.0),
    capacity_s=st.floats(4.0, 60.0),
    step_s=st.floats(0.5, 120.0),
    noise=st.floats(0.0, 0.5),
    low=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_any_load_is_met_within_bounds_without_flapping(
    rate: float, target_rate: float, replicas: int, load_s: float, capacity_s: float, step_s: float, noise: float,
    low: int, seed: int,
) -> None:  # fmt: skip
    config = AutoscaleConfig(min=low, max=12)
    run = SimulatedRun(
        config, lambda now_s: rate, target_rate, replicas=max(low, replicas), load_s=load_s, capacity=capacity_s * rate,
        step_samples=max(1, round(rate * step_s)), noise=noise, seed=seed,
    )  # fmt: skip
    run.run(3 * HOUR_S)
    assert all(low <= targets <= 12 for targets in run.scalings())
    assert len(run.scalings(2 * HOUR_S)) <= 6
    needed = rate / target_rate
    if needed <= 11:
        assert run.num_serving >= min(math.ceil(0.85 * needed), 12)
        assert run.waited(2 * HOUR_S) < 0.12
    # What noise makes the trainer wait for is no want of targets, but it cannot be told from one.
    assert run.num_serving <= max(low, needed * (1.25 + noise) + 2)


# One moment at a time


def look(time_s: float, **changes: Any) -> Observation:
    seen = {
        "time_s": time_s, "steps": (), "ready_fill": 0.0, "is_held_back": False, "num_wanted": 1, "num_serving": 1,
        "num_starting": 0,
    }  # fmt: skip
    return Observation(**(seen | changes))


def starve(autoscaler: Autoscaler, from_s: float, **changes: Any) -> Decision | None:
    """Half a minute in which the trainer waits for half of each step; the first decision in it."""
    for second in range(31):
        time_s = from_s + second
        decision = autoscaler.observe(look(time_s, **({"steps": [StepTime(time_s, 1.0, 0.5)]} | changes)))
        if decision is not None:
            return decision
    return None


def test_decision_says_what_it_was_made_for() -> None:
    assert starve(Autoscaler(MOST), 0.0) == Decision(
        2, "the trainer waited 50 % of 30 s and 0 % of the buffer held samples for it"
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"is_steady": False},
        {"has_captures_to_come": False},
        {"num_starting": 1, "num_wanted": 2},
        {"ready_fill": 0.5},
        {"num_serving": 0},
    ],
)
def test_waiting_trainer_is_no_reason_while(changes: dict[str, Any]) -> None:
    assert starve(Autoscaler(MOST), 0.0, **changes) is None


def test_first_step_after_a_start_or_a_loss_is_not_judged() -> None:
    autoscaler = Autoscaler(AutoscaleConfig(max=4, window_s=1.0))
    assert autoscaler.observe(look(10.0, steps=[StepTime(10.0, 9.0, 8.0)])) is None
    assert autoscaler.observe(look(11.0, is_steady=False)) is None
    assert autoscaler.observe(look(30.0, steps=[StepTime(30.0, 18.0, 17.0)])) is None
    assert autoscaler.observe(look(32.0, steps=[StepTime(32.0, 2.0, 1.0)])) is not None


def test_number_outside_the_bounds_is_brought_back() -> None:
    autoscaler = Autoscaler(AutoscaleConfig(min=2, max=4))
    assert autoscaler.observe(look(1.0, num_wanted=6, num_serving=6)) == Decision(
        4, "autoscaling keeps them between 2 and 4"
    )
    assert autoscaler.observe(look(2.0, num_wanted=1)) == Decision(2, "autoscaling keeps them between 2 and 4")


def test_target_that_hangs_while_loading_is_counted_out_in_the_end() -> None:
    autoscaler = Autoscaler(MOST)
    assert starve(autoscaler, 0.0, num_wanted=2, num_starting=1) is None
    assert starve(autoscaler, 1300.0, num_wanted=2, num_starting=1) == Decision(
        3, "the trainer waited 50 % of 30 s and 0 % of the buffer held samples for it"
    )


def test_what_was_before_is_forgotten_on_request() -> None:
    autoscaler = Autoscaler(MOST)
    for second in range(25):
        autoscaler.observe(look(float(second), steps=[StepTime(float(second), 1.0, 0.5)]))
    autoscaler.forget(25.0)
    assert starve(autoscaler, 25.0) is None
    assert starve(autoscaler, 60.0) is not None
