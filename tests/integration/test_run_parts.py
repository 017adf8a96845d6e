"""Parts of a run as Ray actors: what their failures look like to the driver."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import ray

from evaluation.report import Report
from services.errors import PlacementError, PromptError, SlipstreamError
from services.placement import Ask
from trainer.checkpoint import best_checkpoint
from trainer.cluster import check_fits, result_of, start_part, wait_started
from trainer.evaluations import Evaluations
from trainer.recipe import Recipe

pytestmark = pytest.mark.usefixtures("ray_cluster")

DEADLINE_S = 60.0


@pytest.fixture
def part_class() -> type:
    """A part that starts only on even numbers. It is local, so that it travels to workers by value."""

    class Part:
        def __init__(self, number: int) -> None:
            if number % 2:
                raise PromptError(f"{number} is odd")
            self.number = number

        def pid(self) -> int:
            return os.getpid()

        def half(self) -> int:
            return self.number // 2

    return Part


def poll(ask: Callable[[], object]) -> None:
    """Ask until the deadline, or until it raises."""
    deadline_s = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline_s:
        ask()


def make_recipe(max_new_tokens: int = 8) -> Recipe:
    return Recipe.model_validate(
        {
            "target": {"model": "nowhere"},
            "prompts": {"source": "stdlib", "heldout": "stdlib"},
            "evaluation": {"max_samples": 1, "max_new_tokens": max_new_tokens, "threads": 1},
        }
    )


def test_part_answers_once_it_has_started(part_class: type) -> None:
    part = start_part(part_class, 6)
    wait_started([part])
    assert result_of(part.actor.half.remote(), "the part", timeout_s=DEADLINE_S) == 3


def test_error_of_a_constructor_comes_as_it_was_raised(part_class: type) -> None:
    with pytest.raises(PromptError, match=r"^3 is odd$"):
        wait_started([start_part(part_class, 2), start_part(part_class, 3)])


def test_part_that_the_whole_cluster_cannot_hold_is_refused_naming_the_resource(part_class: type) -> None:
    with pytest.raises(PlacementError, match="Part asks for 3 GPU, the cluster has 0 in all"):
        start_part(part_class, 2, ask=Ask(num_gpus=3))
    with pytest.raises(PlacementError, match="Part asks for 99 CPU"):
        check_fits("Part", Ask(num_cpus=99))
    with pytest.raises(PlacementError, match=r"Part asks for 0\.5 fpga, the cluster has 0 in all"):
        start_part(part_class, 2, ask=Ask(resources={"fpga": 0.5}))
    with pytest.raises(PlacementError, match="Part asks for a node with label zone=b, and the cluster has none"):
        start_part(part_class, 2, ask=Ask(labels={"zone": "b"}))


def test_part_is_placed_where_labels_and_resources_are(part_class: type) -> None:
    (node,) = ray.nodes()
    part = start_part(part_class, 6, ask=Ask(num_cpus=0.5, labels={"ray.io/node-id": node["NodeID"], "zone": "!b"}))
    wait_started([part])
    assert result_of(part.actor.half.remote(), "the part", timeout_s=DEADLINE_S) == 3


def test_part_that_died_is_named(part_class: type) -> None:
    part = start_part(part_class, 2)
    wait_started([part])
    os.kill(result_of(part.actor.pid.remote(), "the part", timeout_s=DEADLINE_S), signal.SIGKILL)
    with pytest.raises(SlipstreamError, match="the part died; the same command again goes on"):
        poll(lambda: result_of(part.actor.half.remote(), "the part", timeout_s=DEADLINE_S))


def test_failed_evaluator_says_why_and_can_be_asked_again(tmp_path: Path) -> None:
    evaluations = Evaluations(make_recipe(), "target", tmp_path / "evaluations.jsonl")
    for _ in range(2):
        evaluations.request(tmp_path / "step_0", [[]])
        assert not evaluations.is_idle
        with pytest.raises(PromptError, match="held-out prompt 0 has no tokens"):
            poll(lambda: evaluations.collect(timeout_s=1.0))
        assert evaluations.is_idle
    evaluations.close()


def make_report(checkpoint: Path, accepted_length: float = 0) -> Report:
    return Report.model_validate(
        dict.fromkeys(Report.model_fields, 0) | {
            "label": checkpoint.name, "checkpoint": str(checkpoint), "accepted_length": accepted_length,
            "interval": (1, 2), "accept_rate": (), "cond_accept_rate": (), "lossless": None, "first_divergence": None,
        }
    )  # fmt: skip


def test_best_measured_checkpoint_is_pointed_to(tmp_path: Path) -> None:
    evaluations = Evaluations(make_recipe(), "target", tmp_path / "evaluations.jsonl")
    for step, accepted_length in ((0, 1.0), (3, 2.5), (6, 2.25)):
        (tmp_path / f"step_{step}").mkdir()
        evaluations._reports[f"step_{step}"] = make_report(tmp_path / f"step_{step}", accepted_length)
        evaluations._write()
    assert best_checkpoint(tmp_path) == tmp_path / "step_3"


def test_results_of_other_settings_are_not_taken_for_these(tmp_path: Path) -> None:
    log, checkpoint = tmp_path / "evaluations.jsonl", tmp_path / "step_0"
    report = make_report(checkpoint)
    evaluations = Evaluations(make_recipe(), "target", log)
    evaluations._reports["step_0"] = report
    evaluations._write()
    same, other = Evaluations(make_recipe(), "target", log), Evaluations(make_recipe(max_new_tokens=9), "target", log)
    assert same.report(checkpoint) == report
    assert other.report(checkpoint) is None
    same.request(checkpoint, [[1]])
    assert same.is_idle, "measured already"
