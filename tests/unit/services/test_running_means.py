from __future__ import annotations

import pytest

from services.running_means import SMOOTHING_STEPS, RunningMeans


def test_few_steps_give_plain_means() -> None:
    means = RunningMeans()
    assert means.add({"loss": 4.0}) == {"loss": 4.0}
    assert means.add({"loss": 2.0}) == {"loss": pytest.approx(3.0)}
    assert means.add({"loss": 0.0}) == {"loss": pytest.approx(2.0)}


def test_later_a_step_weighs_one_in_twenty() -> None:
    means = RunningMeans()
    for _ in range(SMOOTHING_STEPS):
        means.add({"loss": 1.0})
    assert means.add({"loss": 3.0})["loss"] == pytest.approx(1.1)  # 19/20 · 1 + 1/20 · 3


def test_metric_begins_with_its_first_value_and_is_shown_while_steps_have_it() -> None:
    means = RunningMeans()
    means.add({"loss": 4.0})
    assert means.add({"loss": 4.0, "accept_rate@0": 0.5}) == {"loss": 4.0, "accept_rate@0": 0.5}
    assert means.add({"loss": 4.0}) == {"loss": 4.0}
