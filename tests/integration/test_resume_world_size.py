"""A run that goes on with more ranks, then with fewer, against one that was never interrupted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rank_group import losses_of, make_recipe, save_target, train_group
from safetensors.torch import load_file

STEPS = 6
PLAN = 8 * STEPS - 3
"""Uses of the plan: the last step has 5 of 8, so that one of two ranks trains on nothing in its last pass."""

WAYS = [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16"), (2, "bf16")]
"""ZeRO stages and precisions; bf16 has no stage 0."""


@pytest.fixture(scope="module")
def target_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_target(tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the uninterrupted runs lie, one for each way."""
    return tmp_path_factory.mktemp("runs")


def train(
    target_folder: Path, output_dir: Path, world_size: int, resume_from: Path | None = None, **trainer: Any
) -> None:
    """One attempt, up to the end of the plan."""
    settings = {"micro_batch_size": 2, "checkpoint_every": 2, "max_steps": STEPS, "keep_checkpoints": 9} | trainer
    recipe = make_recipe(target_folder, output_dir, world_size=world_size, deterministic=True, **settings)
    for result in train_group(recipe, resume_from, num_uses=PLAN):
        assert not result["drew_randomly"], "the state of a global generator would have to be saved, rank by rank"


def uninterrupted(target_folder: Path, runs: Path, zero_stage: int, precision: str) -> Path:
    """A run of one rank, trained once."""
    output_dir = runs / f"{precision}_{zero_stage}"
    if not output_dir.exists():
        train(target_folder, output_dir, 1, zero_stage=zero_stage, precision=precision)
    return output_dir


@pytest.mark.parametrize(("zero_stage", "precision"), WAYS)
def test_one_rank_then_two_then_one_continue_exactly(
    target_folder: Path, runs: Path, tmp_path: Path, zero_stage: int, precision: str
) -> None:
    way: dict[str, Any] = {"zero_stage": zero_stage, "precision": precision}
    one, two, again = uninterrupted(target_folder, runs, zero_stage, precision), tmp_path / "two", tmp_path / "again"
    train(target_folder, two, 2, one / "step_2", **way)
    train(target_folder, again, 1, two / "step_4", **way)
    expected = losses_of(one)
    assert expected[STEPS - 1] < expected[1]
    assert losses_of(two) == pytest.approx({step: expected[step] for step in (3, 4, 5, 6)}, abs=1e-5)
    assert losses_of(again) == pytest.approx({step: expected[step] for step in (5, 6)}, abs=1e-5)


@pytest.mark.parametrize(("zero_stage", "precision"), WAYS[1:])
def test_every_stage_and_precision_adds_up_the_same_gradients(
    target_folder: Path, runs: Path, zero_stage: int, precision: str
) -> None:
    # Moments are gradients added up; of bf16 they have bf16's rounding, of fp32 the order of summands.
    plain, other = (
        load_file(uninterrupted(target_folder, runs, *way) / "step_2" / "training_state" / "exp_avg.safetensors")
        for way in (WAYS[0], (zero_stage, precision))
    )
    for name, expected in plain.items():
        error = (other[name] - expected).norm() / expected.norm()
        assert error < (1e-4 if precision == "fp32" else 0.1), name


def test_run_goes_on_at_another_stage_and_precision(target_folder: Path, runs: Path, tmp_path: Path) -> None:
    one = uninterrupted(target_folder, runs, 0, "fp32")
    train(target_folder, tmp_path / "bf16", 2, one / "step_2", zero_stage=2, precision="bf16")
    train(target_folder, tmp_path / "fp32", 1, tmp_path / "bf16" / "step_4", zero_stage=1, precision="fp32")
    expected = losses_of(one)
    for output_dir, steps in (("bf16", (3, 4, 5, 6)), ("fp32", (5, 6))):
        assert losses_of(tmp_path / output_dir) == pytest.approx({step: expected[step] for step in steps}, rel=1e-2)
