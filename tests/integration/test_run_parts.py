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
from evaluation.weights import weights_digest
from services.contracts import HeldoutPrompt
from services.errors import PartDiedError, PlacementError, PromptError, ReplayUnavailableError, SlipstreamError
from services.placement import Ask
from trainer.checkpoint import best_checkpoint, prune
from trainer.cluster import check_fits, result_of, start_part, wait_started
from trainer.evaluations import Evaluations, _Key
from trainer.recipe import Recipe

pytestmark = pytest.mark.usefixtures("ray_cluster")

DEADLINE_S = 300.0


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


def make_recipe(**evaluation: int) -> Recipe:
    return Recipe.model_validate(
        {
            "target": {"model": "nowhere"},
            "prompts": {"source": "stdlib", "heldout": "stdlib"},
            "evaluation": {"max_samples": 1, "max_new_tokens": 8, "threads": 1, **evaluation},
        }
    )


def test_part_answers_once_it_has_started(part_class: type) -> None:
    part = start_part(part_class, 6)
    wait_started([part])
    assert result_of(part.actor.half.remote(), "the part", timeout_s=DEADLINE_S) == 3


def test_part_that_meets_a_redis_which_is_brought_back_begins_again() -> None:
    class Part:
        num_begun = 0

        def __init__(self, patience: int) -> None:
            self.num_begun += 1
            if self.num_begun < patience:
                raise ReplayUnavailableError("Redis does not answer")

        def count(self) -> int:
            return self.num_begun

    part = start_part(Part, 3)
    wait_started([part])
    assert result_of(part.actor.count.remote(), "the part", timeout_s=DEADLINE_S) == 3


def test_part_that_dies_while_it_starts_does_not_end_the_wait_for_the_others(tmp_path: Path) -> None:
    died = tmp_path / "died"

    class Dying:
        def __init__(self) -> None:
            died.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    class Slow:
        def __init__(self) -> None:
            while not died.exists():
                time.sleep(0.05)
            time.sleep(0.5)

    parts = [start_part(Dying), start_part(Slow)]
    with pytest.raises(PartDiedError, match="Dying"):
        wait_started(parts)
    ready, _ = ray.wait([parts[1].started], timeout=0)
    assert ready == [parts[1].started]


def test_part_begins_once_even_if_told_so_twice_at_the_same_time() -> None:
    class Slow:
        num_begun = 0

        def __init__(self) -> None:
            self.num_begun += 1
            time.sleep(0.5)

        def count(self) -> int:
            return self.num_begun

    part = start_part(Slow, max_concurrency=3)
    second = part.actor.begin.remote()
    wait_started([part])
    result_of(second, "the part", timeout_s=DEADLINE_S)
    assert result_of(part.actor.count.remote(), "the part", timeout_s=DEADLINE_S) == 1


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


def make_checkpoint(folder: Path, weights: str = "weights") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_text(weights)
    return folder


def test_failed_evaluator_says_why_and_can_be_asked_again(tmp_path: Path) -> None:
    evaluations = Evaluations(make_recipe(), "target", tmp_path / "evaluations.jsonl")
    checkpoint = make_checkpoint(tmp_path / "step_0")
    for during in (False, True):
        assert evaluations.request(checkpoint, [HeldoutPrompt(token_ids=[])], during=during)
        assert (evaluations.is_idle, evaluations.under_way) == (False, "step_0")
        with pytest.raises(PromptError, match="held-out prompt 0 has no tokens"):
            poll(lambda: evaluations.collect(timeout_s=1.0))
        assert evaluations.is_idle
    evaluations.close()


def make_report(checkpoint: Path, samples: tuple[tuple[int, int], ...]) -> Report:
    """Of a checkpoint with these committed tokens and rounds by sample."""
    return Report.model_validate(
        dict.fromkeys(Report.model_fields, 0) | {
            "label": checkpoint.name, "checkpoint": str(checkpoint), "samples": samples, "num_samples": len(samples),
            "accepted_length": sum(tokens for tokens, _ in samples) / sum(rounds for _, rounds in samples),
            "interval": (1, 2), "accept_rate": (), "cond_accept_rate": (), "lossless": None, "first_divergence": None,
            "weights": weights_digest(checkpoint), "domains": {},
        }
    )  # fmt: skip


class StandIn:
    """An evaluator that has measured: its process is not what is tested."""

    def __init__(self, evaluations: Evaluations) -> None:
        self.evaluations = evaluations

    def measures(self, checkpoint: Path, *samples: tuple[int, int], asked: int | None = None) -> Report:
        report = make_report(checkpoint, samples)
        key = _Key(report.label, report.weights, asked or len(samples))
        self.evaluations._reports[key] = report
        self.evaluations._write()
        return report


def test_best_measured_checkpoint_is_pointed_to_over_the_same_prompts(tmp_path: Path) -> None:
    measured = StandIn(Evaluations(make_recipe(max_samples=2), "target", tmp_path / "evaluations.jsonl"))
    checkpoints = {step: make_checkpoint(tmp_path / f"step_{step}", str(step)) for step in (0, 3, 6, 9)}
    measured.measures(checkpoints[0], (9, 1))
    assert best_checkpoint(tmp_path) is None, "the untrained drafter does not count"
    measured.measures(checkpoints[3], (20, 8))
    measured.measures(checkpoints[6], (18, 8))
    assert best_checkpoint(tmp_path) == checkpoints[3]
    measured.measures(checkpoints[9], (16, 8), (90, 10))
    assert best_checkpoint(tmp_path) == checkpoints[3], "the second prompt is an easy one"
    make_checkpoint(checkpoints[3], "trained anew")
    measured.measures(checkpoints[0], (9, 1))
    assert best_checkpoint(tmp_path) == checkpoints[6], "what was measured at step 3 is no longer there"


def test_results_of_other_settings_or_weights_are_not_taken_for_these(tmp_path: Path) -> None:
    log, checkpoint = tmp_path / "evaluations.jsonl", make_checkpoint(tmp_path / "step_0")
    report = StandIn(Evaluations(make_recipe(), "target", log)).measures(checkpoint, (5, 2))
    same, other = Evaluations(make_recipe(), "target", log), Evaluations(make_recipe(max_new_tokens=9), "target", log)
    assert same.report(checkpoint) == report
    assert other.report(checkpoint) is None
    assert same.request(checkpoint, [HeldoutPrompt(token_ids=[1])])
    assert same.is_idle, "measured already"
    StandIn(other).measures(checkpoint, (6, 2))
    assert Evaluations(make_recipe(), "target", log).report(checkpoint) == report, "kept beside the other settings'"
    make_checkpoint(checkpoint, "others")
    assert same.report(checkpoint) is None


def test_checkpoint_is_held_while_it_is_measured_and_one_that_is_gone_is_no_error(tmp_path: Path) -> None:
    evaluations = Evaluations(make_recipe(), "nowhere", tmp_path / "evaluations.jsonl")
    for step in (1, 2, 3):
        make_checkpoint(tmp_path / f"step_{step}")
    assert evaluations.request(tmp_path / "step_1", [HeldoutPrompt(token_ids=[1])], during=True)
    assert prune(tmp_path, keep=1) == [tmp_path / "step_2"]
    assert (tmp_path / "step_1").is_dir()
    evaluations.close()
    assert prune(tmp_path, keep=1) == [tmp_path / "step_1"]
    assert not evaluations.request(tmp_path / "step_1", [HeldoutPrompt(token_ids=[1])], during=True)
    assert evaluations.is_idle
