from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from untrained import DEMO_TARGET, save_untrained, write_turns

from drafters.checkpoint import load_drafter
from evaluation.benchmark import BenchmarkSettings
from evaluation.compare.entrants import Match, count_parameters, labelled, labels_of, prepare_match
from evaluation.session import TaskChoice
from services.errors import CheckpointError, UsageError


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("drafters")
    return [save_untrained(folder / "a" / "step_9"), save_untrained(folder / "b" / "step_9", markov_rank=2)]


def plan(drafters: list[Path], folder: Path, **changes) -> Match:
    prompts = write_turns(folder / "prompts", gsm8k=["1+1?", "2+2?"])

    def settings_of(drafter: str) -> BenchmarkSettings:
        return BenchmarkSettings.model_validate({"target": str(DEMO_TARGET), "drafter": drafter} | changes)

    return prepare_match(drafters, settings_of, TaskChoice(folder=prompts), lambda text: None)


def test_all_drafters_get_the_same_prompts_and_seeds(checkpoints, tmp_path):
    match = plan(checkpoints, tmp_path)
    first, second = (entrant.session.tasks for entrant in match.entrants)
    assert first == second == match.tasks
    assert [entrant.label for entrant in match.entrants] == ["a", "b"]
    assert len({entrant.folder_name for entrant in match.entrants}) == 2
    assert not {"drafter", "drafter_digest"} & match.plain_identity.keys()
    assert match.plain_identity["temperature"] == 1.0


@pytest.mark.parametrize(
    ("paths", "labels"),
    [
        (["/runs/dspark", "/runs/dflash"], ["dspark", "dflash"]),
        (["/a/step_8", "/a/step_9"], ["step_8", "step_9"]),
        (["/a/step_9", "/b/step_9"], ["a", "b"]),
        (["/a/run/step_9", "/b/run/step_9"], ["a", "b"]),
        (["/x/a/step_9", "/y/a/step_9", "/y/b/step_1"], ["x/a/step_9", "y/a/step_9", "y/b/step_1"]),
        (["/step_9", "/a/step_9"], ["/", "a"]),
        (["/dspark/step_2200", "/dflash/step_3200"], ["dspark/step_2200", "dflash/step_3200"]),
        (["/a/demo/step_8", "/b/demo/step_9"], ["a/demo/step_8", "b/demo/step_9"]),
        (["/a/step_8", "/released"], ["step_8", "released"]),
    ],
)
def test_labels_are_the_shortest_ends_that_differ(paths, labels):
    assert labels_of([Path(path) for path in paths]) == labels


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_drafters_are_refused(checkpoints, tmp_path, count):
    with pytest.raises(UsageError, match=f"two drafters or more, and {count} was given.*slipstream eval"):
        plan(checkpoints[:count], tmp_path)


def test_same_drafter_twice_is_refused_under_whatever_path(checkpoints, tmp_path):
    with pytest.raises(UsageError, match="is there twice"):
        plan([checkpoints[0], checkpoints[1], checkpoints[0]], tmp_path)
    (tmp_path / "step_best").symlink_to(checkpoints[0])
    with pytest.raises(UsageError, match=r"step_9 and .*step_best are the same folder"):
        plan([checkpoints[0], tmp_path / "step_best"], tmp_path)
    copy = shutil.copytree(checkpoints[0], tmp_path / "copy")
    with pytest.raises(UsageError, match="step_9 and copy hold the same config and weights"):
        plan([checkpoints[0], copy], tmp_path)


def test_folder_without_a_checkpoint_is_named(checkpoints, tmp_path):
    with pytest.raises(CheckpointError, match="nowhere is no drafter checkpoint"):
        plan([checkpoints[0], tmp_path / "nowhere"], tmp_path)


def test_weights_that_cannot_be_read_are_named(checkpoints, tmp_path):
    broken = shutil.copytree(checkpoints[0], tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(CheckpointError, match=r"cannot read the weights of the drafter at .*broken/model.safetensors"):
        plan([checkpoints[1], broken], tmp_path)


def test_drafter_of_another_target_is_refused_unless_allowed(checkpoints, tmp_path):
    other = save_untrained(tmp_path / "other", markov_rank=3, provenance={"model": "x/y", "fingerprint": "f00"})
    with pytest.raises(CheckpointError, match="was trained with x/y"):
        plan([checkpoints[0], other], tmp_path)
    match = plan([checkpoints[0], other], tmp_path, allow_other_target=True)
    assert match.warnings == ["other: the drafter was trained with another target, x/y"]


def test_warnings_that_all_have_are_said_once():
    assert labelled({"a": ["x", "y"], "b": ["x"]}) == ["x", "a: y"]


def test_parameters_are_counted_with_and_without_the_targets_tables(checkpoints):
    drafter = load_drafter(checkpoints[0])
    sizes = {name: tensor.numel() for name, tensor in drafter.state_dict().items()}
    tables = sizes["embed_tokens.weight"] + sizes["lm_head.weight"]
    found = count_parameters(checkpoints[0])
    assert found.in_all == sum(sizes.values())
    assert found.own == found.in_all - tables
