from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from evaluation.config import EvaluationConfig
from services.contracts import HeldoutPrompt, TargetState
from services.errors import CheckpointError, DeadlineError, PartDiedError, SlipstreamError
from services.placement import Node
from trainer import measuring as measuring_module
from trainer.measuring import Measuring, next_step, node_beside
from trainer.supervision import Restarts

PROMPTS = [HeldoutPrompt(token_ids=[1])]


def test_untrained_drafter_is_measured_first() -> None:
    assert next_step(0, None, None, None) == 0
    assert next_step(900, None, 400, 900) == 0


def test_slow_evaluator_skips_to_the_newest_checkpoint() -> None:
    """A checkpoint each 100 steps, and an evaluator that is free at these."""
    measured: list[int] = []
    for newest in (0, 0, 100, 400, 400, 700, 900, 1000):
        step = next_step(newest, measured[-1] if measured else None, None, 1000)
        measured += [] if step is None else [step]
    assert measured == [0, 100, 400, 700, 900], "200, 300 and so on are skipped; the last waits for the end"


def test_one_checkpoint_is_measured_for_each_interval() -> None:
    assert [next_step(newest, 100, 400, None) for newest in (300, 400, 500)] == [None, 400, 500]
    assert [next_step(newest, 500, 400, None) for newest in (700, 800, 1700)] == [None, 800, 1700]


def test_older_checkpoint_than_the_last_measured_is_not_measured() -> None:
    assert next_step(200, 200, None, None) is None
    assert next_step(100, 200, None, None) is None


def test_evaluator_goes_to_the_node_of_a_serving_target() -> None:
    nodes = [Node({"node:10.0.0.1": 1.0, "GPU": 8.0}, {}), Node({"node:10.0.0.2": 1.0}, {})]
    loading = TargetState(index=0, state="loading", address="10.0.0.1:5000")
    serving = TargetState(index=1, state="serving", address="10.0.0.2:5000")
    elsewhere = TargetState(index=2, state="serving", address="gateway:5000")
    assert node_beside([loading, elsewhere, serving], nodes) == "10.0.0.2"
    assert node_beside([loading, elsewhere], nodes) is None, "named by no node: Ray chooses"


class Evaluator:
    """Has measured what is in `measured`, and fails or dies as it is told to."""

    is_enabled = True

    def __init__(self, **settings: object) -> None:
        self.config = EvaluationConfig.model_validate(settings)
        self.measured: list[str] = []
        self.requests: list[tuple[str, int | None, bool]] = []
        self.failures: list[SlipstreamError] = []
        self.is_endless = self.was_closed = False
        self.under_way: str | None = None

    @property
    def is_idle(self) -> bool:
        return self.under_way is None

    def report(self, checkpoint: Path) -> bool | None:
        return checkpoint.name in self.measured or None

    has_measured = report

    def last_step(self, newest: int) -> int:
        return max(int(name.removeprefix("step_")) for name in self.measured)

    def request(
        self, checkpoint: Path, prompts: Sequence[HeldoutPrompt], num_samples: int | None = None, *,
        during: bool = False, beside: str | None = None,
    ) -> bool:  # fmt: skip
        assert prompts == PROMPTS
        self.requests.append((checkpoint.name, num_samples, during))
        if not checkpoint.is_dir():
            return False
        self.under_way = checkpoint.name
        return True

    def wait_started(self, look: object) -> None:
        pass

    def collect(self, *, timeout_s: float = 0.0) -> str | None:
        if self.failures and self.under_way:
            self.under_way = None
            raise self.failures.pop(0)
        if self.under_way is None or self.is_endless:
            return None
        self.measured.append(self.under_way)
        self.under_way = None
        return self.measured[-1]

    def close(self) -> None:
        self.was_closed, self.under_way = True, None


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    for step in (0, 100, 200):
        (tmp_path / f"step_{step}").mkdir()
    (tmp_path / "step_latest").symlink_to("step_100")
    monkeypatch.setattr(measuring_module, "alive_nodes", list)

    def start(**settings: object) -> tuple[Evaluator, Measuring]:
        evaluator = Evaluator(max_samples=8, **settings)
        restarts = Restarts("the evaluator")
        measuring = Measuring(
            evaluator, tmp_path, PROMPTS, restarts, list, made.shown.append,  # type: ignore[arg-type]
            lambda kind, words: made.said.append((kind, words)),
        )  # fmt: skip
        return evaluator, measuring

    made = SimpleNamespace(folder=tmp_path, start=start, shown=[], said=[])
    return made


def test_run_measures_few_prompts_during_training_and_all_at_its_end(run: SimpleNamespace) -> None:
    evaluator, measuring = run.start(during_samples=3)
    for _ in range(5):
        measuring.look(last_step=200)
    assert evaluator.requests == [("step_0", 3, True), ("step_100", 3, True)]
    assert run.shown == ["step_0", "step_100"]
    evaluator.measured.clear()
    measuring.finish(run.folder / "step_200", lambda: None)
    assert evaluator.requests[2:] == [("step_200", None, False), ("step_0", None, False)]
    assert run.shown[2:] == ["step_200", "step_0"]
    assert not run.said


def test_run_measures_nothing_during_training_if_it_is_told_to(run: SimpleNamespace) -> None:
    evaluator, measuring = run.start(placement="off")
    measuring.look(last_step=200)
    assert not evaluator.requests
    measuring.finish(run.folder / "step_200", lambda: None)
    assert run.shown == ["step_200", "step_0"]


def test_dead_evaluator_is_started_again_and_one_that_fails_is_left_until_the_end(run: SimpleNamespace) -> None:
    evaluator, measuring = run.start()
    evaluator.failures = [PartDiedError("killed")]
    for _ in range(4):
        measuring.look(last_step=200)
    assert evaluator.was_closed
    assert run.shown == ["step_0"]
    assert [kind for kind, _ in run.said] == ["restart"]
    evaluator.failures = [CheckpointError("no drafter")]
    for _ in range(3):
        measuring.look(last_step=200)
    assert run.said[1:] == [("evaluation", "nothing more is measured before the end of training: no drafter")]
    assert [name for name, *_ in evaluator.requests] == ["step_0", "step_0", "step_100"]
    evaluator.failures = [PartDiedError("killed")]
    measuring.finish(run.folder / "step_200", lambda: None)
    assert run.shown == ["step_0", "step_200"]


def test_end_of_a_run_waits_for_its_measurements_no_longer_than_it_says(run: SimpleNamespace) -> None:
    evaluator, measuring = run.start(wait_s=0.01)
    evaluator.is_endless = True
    with pytest.raises(DeadlineError, match=r"decoded with step_200 0\.01 s after training \(evaluation\.wait_s\)"):
        measuring.finish(run.folder / "step_200", lambda: None)


def test_checkpoint_that_is_deleted_is_named_at_the_end(run: SimpleNamespace) -> None:
    evaluator, measuring = run.start()
    evaluator.measured = ["step_0"]
    with pytest.raises(CheckpointError, match="step_300 was deleted before held-out prompts were decoded with it"):
        measuring.finish(run.folder / "step_300", lambda: None)
