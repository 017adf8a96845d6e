from __future__ import annotations

import pytest

from trainer.evaluation_cost import EvaluationCostMeter, Span, evaluation_cost


def steps(begin_s: float, count: int, step_s: float) -> list[Span]:
    return [Span(begin_s + i * step_s, begin_s + (i + 1) * step_s) for i in range(count)]


def test_steps_within_an_evaluation_are_compared_with_those_outside() -> None:
    slow = steps(10.0, 20, 0.75)  # until 25
    cost = evaluation_cost([*steps(0.0, 20, 0.5), *slow, *steps(25.0, 11, 0.5)], [Span(10.0, 25.0)])
    assert (cost.num_measured, cost.num_steps_during, cost.num_steps_otherwise) == (1, 20, 31)
    assert (cost.step_s_during, cost.step_s_otherwise, cost.ratio) == (0.75, 0.5, 1.5)


def test_steps_in_which_an_evaluation_begins_or_ends_count_for_neither() -> None:
    cost = evaluation_cost(steps(0.0, 40, 1.0), [Span(20.5, 30.5), Span(5.25, 5.5)])
    assert (cost.num_measured, cost.num_steps_during) == (2, 9), "21 to 30"
    assert cost.num_steps_otherwise == 40 - 9 - 3
    assert (cost.step_s_during, cost.step_s_otherwise, cost.ratio) == (None, None, None), "nine steps say nothing"


def test_one_long_wait_does_not_hide_what_steps_cost() -> None:
    cost = evaluation_cost([*steps(0.0, 10, 1.0), Span(10.0, 110.0), *steps(110.0, 11, 2.0)], [Span(109.0, 200.0)])
    assert cost.ratio == 2.0


def test_what_is_measured_after_training_costs_no_step() -> None:
    meter = EvaluationCostMeter()
    meter.take({"kind": "step", "time_s": 50.0, "step_s": 40.0})  # waits for the buffer
    for number in range(12):
        meter.take({"kind": "step", "time_s": 51.0 + number, "step_s": 1.0})
    meter.take({"kind": "evaluation", "began_s": 70.0, "time_s": 90.0})
    meter.take({"kind": "figures", "time_s": 91.0})
    cost = meter.cost()
    assert (cost.num_measured, cost.num_steps_during, cost.num_steps_otherwise) == (0, 0, 12)
    assert evaluation_cost([], []).num_measured == 0


@pytest.mark.parametrize("evaluation", [Span(0.0, 1.0), Span(3.0, 4.0)])
def test_evaluation_that_ends_or_begins_with_a_step_is_not_beside_it(evaluation: Span) -> None:
    assert evaluation_cost([Span(1.0, 3.0)], [evaluation]).num_steps_otherwise == 1
