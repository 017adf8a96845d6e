"""The training loop on a real DeepSpeed engine, with one rank and with two."""

from __future__ import annotations

import json
import os
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from rank_group import DRAFTERS, keep_vocabulary, losses_of, make_recipe, save_target, train_group, weights_of

COMPILERS = {"g++", "gcc", "c++", "cc", "cc1plus", "ninja", "nvcc", "ld", "clang"}


@pytest.fixture(scope="module")
def target_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_target(tmp_path_factory.mktemp("target"))


@pytest.mark.parametrize(
    ("drafter", "world_size", "zero_stage", "precision"),
    [
        ("dspark", 1, 0, "bf16"),
        ("dspark", 2, 0, "fp32"),
        ("dspark", 2, 3, "fp32"),
        ("eagle3", 1, 0, "bf16"),
        ("eagle3", 2, 3, "fp32"),
    ],
)
def test_resume_is_bit_equal_for_ranks_stages_and_precisions(
    target_folder: Path, tmp_path: Path, drafter: str, world_size: int, zero_stage: int, precision: str
) -> None:
    settings = {"drafter": drafter, "world_size": world_size, "zero_stage": zero_stage, "precision": precision}
    whole = make_recipe(target_folder, tmp_path / "whole", **settings)
    [result, *_] = train_group(whole)
    assert result["steps"] == 6
    losses = losses_of(whole.output_dir)
    assert losses[6] < losses[1]

    resumed_run = make_recipe(target_folder, tmp_path / "resumed", **settings)
    [result, *_] = train_group(resumed_run, whole.output_dir / "step_3")
    assert (result["first_step"], result["steps"]) == (4, 6)
    assert result["final_loss"] == pytest.approx(sum(losses.values()) / 6)
    assert losses_of(resumed_run.output_dir) == {step: losses[step] for step in (4, 5, 6)}
    expected, resumed = weights_of(whole.output_dir / "step_6"), weights_of(resumed_run.output_dir / "step_6")
    assert expected.keys() == resumed.keys()
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_two_ranks_train_what_one_rank_trains(target_folder: Path, tmp_path: Path, drafter: str) -> None:
    # One micro-batch of 8 rows, or two ranks with 4 rows each: the same samples, the same global denominators.
    one = make_recipe(target_folder, tmp_path / "one", drafter, micro_batch_size=8)
    two = make_recipe(target_folder, tmp_path / "two", drafter, micro_batch_size=4, world_size=2)
    for recipe in (one, two):
        if recipe.drafter.draft_vocab_size:
            keep_vocabulary(recipe.output_dir)
    train_group(one)
    results = train_group(two)
    for step, loss in losses_of(one.output_dir).items():
        assert losses_of(two.output_dir)[step] == pytest.approx(loss, rel=1e-4)
    assert sorted(results[0]["acked"] + results[1]["acked"]) == list(range(48))
    rejections = results[0]["rejections"] + results[1]["rejections"]
    assert len(rejections) == 48
    assert all(0 < rejection < 1 for rejection in rejections)
    ours, theirs = weights_of(one.output_dir / "step_6"), weights_of(two.output_dir / "step_6")
    for name, weight in ours.items():
        torch.testing.assert_close(theirs[name], weight, rtol=1e-3, atol=1e-4)


def test_bf16_with_the_fused_loss_follows_float32_with_the_plain_one(target_folder: Path, tmp_path: Path) -> None:
    """200 steps with fp32 masters: the loss stays within 1 % of the exact curve, in means of 20 steps."""
    long = {"max_steps": 200, "checkpoint_every": 200, "micro_batch_size": 8}
    exact = make_recipe(target_folder, tmp_path / "exact", **long)
    exact = exact.model_copy(update={"drafter": exact.drafter.model_copy(update={"loss": "plain"})})
    quick = make_recipe(target_folder, tmp_path / "quick", precision="bf16", **long)
    assert quick.drafter.loss == "fused"
    curves = []
    for recipe in (exact, quick):
        train_group(recipe)
        curves.append(torch.tensor(list(losses_of(recipe.output_dir).values())).view(10, 20).mean(1))
    assert curves[0][-1] < 0.97 * curves[0][0]
    assert not torch.equal(*curves)
    torch.testing.assert_close(curves[1], curves[0], rtol=0.01, atol=0)


def test_micro_batches_of_eagle3_average_to_one_large_one(target_folder: Path, tmp_path: Path) -> None:
    """Each sample counts by its own length, whatever it is padded to; DSpark's micro-batches weigh by their slots."""
    large = make_recipe(target_folder, tmp_path / "large", "eagle3", micro_batch_size=8)
    small = make_recipe(target_folder, tmp_path / "small", "eagle3", micro_batch_size=2)
    for recipe in (large, small):
        train_group(recipe)
    ours, theirs = weights_of(small.output_dir / "step_6"), weights_of(large.output_dir / "step_6")
    for name, weight in ours.items():
        torch.testing.assert_close(theirs[name], weight, rtol=1e-3, atol=1e-4)


def test_run_leaves_whole_checkpoints_and_starts_no_compiler(target_folder: Path, tmp_path: Path) -> None:
    recipe = make_recipe(target_folder, tmp_path / "run", max_steps=4, checkpoint_every=1, keep_checkpoints=2)
    seen: set[str] = set()

    def watch(parent: int) -> None:
        for process in psutil.Process(parent).children(recursive=True):
            try:
                seen.add(process.name())
            except psutil.NoSuchProcess:
                continue

    train_group(recipe, watch=watch)
    assert seen
    assert not seen & COMPILERS
    output = recipe.output_dir
    assert {path.name for path in output.iterdir() if "step" in path.name} == {
        "step_0",
        "step_3",
        "step_4",
        "step_latest",
    }
    assert os.readlink(output / "step_latest") == "step_4"
    checkpoint = output / "step_latest"
    assert {path.name for path in (checkpoint / "training_state").iterdir()} == {
        "weights.safetensors",
        "exp_avg.safetensors",
        "exp_avg_sq.safetensors",
        "state.json",
    }
    assert json.loads((checkpoint / "ledger.jsonl").read_text()) == {"step": 4}
    assert yaml.safe_load((checkpoint / "recipe.yaml").read_text()) == recipe.model_dump(mode="json")
    provenance = json.loads((checkpoint / "provenance.json").read_text())
    assert provenance["command"] == ["slipstream", "test"]
    assert provenance["packages"]["torch"] == torch.__version__
    assert provenance["target"]["enable_thinking"] is False
    start, end = weights_of(output / "step_0"), weights_of(checkpoint)
    moved = {name for name in start if not torch.equal(start[name], end[name])}
    assert moved == start.keys() - {"embed_tokens.weight", "lm_head.weight"}
