from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from evaluation.bench.features import measure_feature_worth
from services.errors import SlipstreamError

Run = dict[str, Any]


def summary(accepted_length: float | None, low: float = 0.0, high: float = 0.0) -> Run:
    interval = None if accepted_length is None else [low, high]
    return {
        "accepted_length_start": 1.0,
        "accepted_length_end": accepted_length,
        "accepted_length_end_interval": interval,
        "steps": 4,
        "total_s": 2.5,
        "run_id": "demo-1",
    }


class FakeDemo:
    """Answers the first run with one summary and the second with another."""

    def __init__(self, ordered: Run, permuted: Run) -> None:
        self._answers = [ordered, permuted]
        self.calls: list[tuple[Path, list[str]]] = []

    def __call__(self, output_dir: Path, overrides: Sequence[str]) -> Run:
        self.calls.append((output_dir, list(overrides)))
        return self._answers[len(self.calls) - 1]


def test_only_the_second_run_permutes_and_both_get_the_overrides() -> None:
    demo, said = FakeDemo(summary(3.0, 2.8, 3.2), summary(2.0, 1.9, 2.1)), []
    worth = measure_feature_worth(["trainer.max_steps=4"], said.append, demo)
    (first_dir, first), (second_dir, second) = demo.calls
    assert first == ["evaluation.max_samples=160", "trainer.max_steps=4"]
    assert second == [*first, "drafter.permute_context=true"]
    assert first_dir != second_dir
    assert not first_dir.parent.exists(), "the runs' files are removed"
    assert len(said) == 2
    assert worth.ratio == pytest.approx(1.5)
    assert worth.intervals_apart


def test_intervals_that_touch_are_not_apart() -> None:
    worth = measure_feature_worth([], lambda _: None, FakeDemo(summary(3.0, 2.1, 3.2), summary(2.0, 1.9, 2.1)))
    assert not worth.intervals_apart


def test_worse_ordered_run_is_not_called_apart() -> None:
    worth = measure_feature_worth([], lambda _: None, FakeDemo(summary(2.0, 1.9, 2.1), summary(3.0, 2.8, 3.2)))
    assert not worth.intervals_apart
    assert worth.ratio < 1


def test_json_holds_both_runs_figures_and_the_hardware() -> None:
    worth = measure_feature_worth([], lambda _: None, FakeDemo(summary(3.0, 2.8, 3.2), summary(2.0, 1.9, 2.1)))
    answer = worth.as_json()
    assert answer.keys() == {"ordered", "permuted", "ratio", "intervals_apart", "hardware"}
    assert answer["permuted"] == summary(2.0, 1.9, 2.1)
    assert answer["ordered"] == summary(3.0, 2.8, 3.2)


def test_runs_without_evaluation_are_refused() -> None:
    with pytest.raises(SlipstreamError, match=r"evaluation\.max_samples"):
        measure_feature_worth([], lambda _: None, FakeDemo(summary(None), summary(None)))


def test_failed_run_ends_the_benchmark_with_its_command() -> None:
    """A setting that no recipe has: the demo's own process refuses it before anything starts."""
    with pytest.raises(SlipstreamError, match=r"trainer\.max_step=1 ended with exit code 2"):
        measure_feature_worth(["trainer.max_step=1"], lambda _: None)
