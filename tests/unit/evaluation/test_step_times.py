from __future__ import annotations

import numpy as np
import pytest
from confidence_rounds import rounds_of

from evaluation.confidence.step_times import StepTimes, Throughput, replay


def test_step_takes_the_draft_and_what_lies_between_measured_passes() -> None:
    times = StepTimes(num_requests=4, draft_s=0.5, verify_s=(1.0, 3.0, 4.0))
    assert times.step_s(4) == pytest.approx(1.5)
    assert times.step_s(6) == pytest.approx(2.5)
    assert times.step_s(8) == pytest.approx(3.5)
    assert times.step_s(12) == pytest.approx(4.5)
    assert times.steps_per_s(8) == pytest.approx(1 / 3.5)


def test_fixed_lengths_give_tokens_over_seconds() -> None:
    rounds = rounds_of([[0.5, 0.5]] * 4, accepted=[2, 0, 1, 2])
    result = replay(rounds, StepTimes(num_requests=2, draft_s=1.0, verify_s=(1.0, 2.0, 3.0)))
    # Two steps of two rounds: 4, then 4 + 3, then 3 + 1 + 2 + 3 tokens in all.
    assert result.fixed == pytest.approx((4 / (2 * 2.0), 7 / (2 * 3.0), 9 / (2 * 4.0)))
    assert result.best_fixed == 1


def test_scheduled_lengths_verify_what_pays() -> None:
    # The head knows which rounds are accepted: one request a step, whole blocks or nothing.
    sure, unsure = [0.99, 0.99], [0.01, 0.01]
    rounds = rounds_of([sure, unsure, sure, unsure], accepted=[2, 0, 2, 0])
    result = replay(rounds, StepTimes(num_requests=1, draft_s=0.0, verify_s=(1.0, 1.5, 2.0)))
    assert result.scheduled == pytest.approx((3 + 1 + 3 + 1) / (2.0 + 1.0 + 2.0 + 1.0))
    assert result.scheduled > max(result.fixed)
    assert result.scheduled_drafts == pytest.approx(1.0)


def test_temperatures_change_what_is_scheduled() -> None:
    rounds = rounds_of([[0.9], [0.9]], accepted=[1, 1])
    times = StepTimes(num_requests=1, draft_s=0.0, verify_s=(1.0, 1.8))
    assert replay(rounds, times).scheduled_drafts == 1.0
    assert replay(rounds, times, [10.0]).scheduled_drafts == 0.0


def test_rounds_that_fill_no_step_are_left_out_and_few_are_taken_again() -> None:
    rounds = rounds_of([[0.5]] * 3, accepted=[1, 1, 1])
    assert replay(rounds, StepTimes(num_requests=2, draft_s=0.0, verify_s=(1.0, 1.0))).fixed == (2.0, 4.0)
    assert replay(rounds, StepTimes(num_requests=8, draft_s=0.0, verify_s=(1.0, 1.0))).fixed == (8.0, 16.0)


def test_rounds_of_a_step_are_the_same_in_every_run() -> None:
    generator = np.random.default_rng(0)
    rounds = rounds_of(generator.uniform(0.1, 0.9, (20, 3)), accepted=generator.integers(0, 4, 20).tolist())
    times = StepTimes(num_requests=4, draft_s=0.1, verify_s=(1.0, 1.2, 1.4, 1.6))
    first = replay(rounds, times)
    assert first == replay(rounds, times)
    assert isinstance(first, Throughput)
