"""Processes that write checkpoints are killed at random moments; a full disk ends a run in order."""

from __future__ import annotations

import random
import resource
from pathlib import Path
from typing import Any

import pytest
from rank_group import fork_context, make_recipe, open_engine, save_target, train_group

from trainer.checkpoint import (
    LOCK,
    best_checkpoint,
    checkpoint_step,
    latest_checkpoint,
    mark_best,
    prune,
    publish,
    start_partial,
)
from trainer.recipe import Recipe

NUM_KILLS, NUM_ENGINE_KILLS = 60, 10
FILES = ("model.safetensors", "training_state/weights.safetensors", "ledger.jsonl")
DEADLINE_S = 400.0


@pytest.fixture
def chance() -> random.Random:
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")  # shown with a failure
    return random.Random(seed)


def kill_at_random(
    target: Any, arguments: tuple[Any, ...], chance: random.Random, longest_s: float, *, after_first: bool = False
) -> None:
    """Start a process that says when it begins to write, and kill it at some moment after.

    Args:
        target: What it does.
        arguments: Its arguments, before `after_first` and the event by which it says so.
        chance: Draws the moment.
        longest_s: How much later it is killed at most.
        after_first: It says so only when it has written one: then something is written, however slow the disk is.
    """
    context = fork_context()
    begun = context.Event()
    process = context.Process(target=target, args=(*arguments, after_first, begun))
    process.start()
    try:
        assert begun.wait(DEADLINE_S), "it ended before it wrote anything" if process.exitcode else "it does not begin"
        process.join(chance.uniform(0, longest_s))
        assert process.exitcode is None, f"it failed by itself, with exit code {process.exitcode}"
    finally:
        process.kill()
        process.join(DEADLINE_S)


def write_files_for_ever(output_dir: Path, seed: int, after_first: bool, begun: Any) -> None:
    """What rank 0 and the driver do with checkpoints, without what is in them."""
    chance = random.Random(seed)
    before = latest_checkpoint(output_dir)
    if not after_first:
        begun.set()
    while True:
        newest = latest_checkpoint(output_dir)
        step = checkpoint_step(newest) if newest else 0
        step += chance.choice((0, 1, 1, 1)) if step else 1  # now and then one of the same step takes its place
        content = f"{step} {chance.random()}\n" * chance.choice((1, 5000))
        partial = start_partial(output_dir, step)
        (partial / "training_state").mkdir()
        for file in FILES:
            (partial / file).write_text(content)
        publish(output_dir, step)
        if latest_checkpoint(output_dir) != before:
            begun.set()
        measured = {path.name: chance.random() for path in output_dir.glob("step_*")}
        mark_best(output_dir, measured)
        prune(output_dir, 2)


def assert_whole(checkpoint: Path) -> None:
    content, *others = [(checkpoint / file).read_text() for file in FILES]
    assert content.startswith(f"{checkpoint_step(checkpoint)} ")
    assert others == [content, content]
    assert len(set(content.splitlines())) == 1
    assert content.endswith("\n")


def test_checkpoint_cut_short_by_a_kill_is_never_picked_up(tmp_path: Path, chance: random.Random) -> None:
    step = 0
    for number in range(NUM_KILLS):
        kill_at_random(write_files_for_ever, (tmp_path, chance.random()), chance, 0.06, after_first=number % 2 == 1)
        newest, best = latest_checkpoint(tmp_path), best_checkpoint(tmp_path)
        for checkpoint in (newest, best):
            if checkpoint:
                assert_whole(checkpoint)
        if newest:
            assert checkpoint_step(newest) >= step, "a published checkpoint was lost"
            step = checkpoint_step(newest)
    assert step >= NUM_KILLS / 2, "hardly anything was written"
    start_partial(tmp_path, step + 1)
    visible = {path.name for path in tmp_path.iterdir()}
    whole = {path for path in tmp_path.glob("step_*") if not path.is_symlink()}
    assert visible - {path.name for path in whole} <= {
        "step_latest", "step_best", f".step_{step + 1}", ".step_latest", ".step_best", LOCK,
    }  # fmt: skip
    for checkpoint in whole:
        assert_whole(checkpoint)


def write_states_for_ever(recipe: Recipe, after_first: bool, begun: Any) -> None:
    """Restore the newest checkpoint, check that all of it is of its step, then write the next ones."""
    import torch
    from safetensors.torch import load_file

    from trainer.saving import CheckpointWriter, restore
    from trainer.training_state import MOMENTS, trainable

    def mark(engine: Any, step: int) -> None:
        for _, parameter in trainable(engine.module):
            parameter.data.fill_(step)
            for moment in MOMENTS:
                engine.optimizer.state[parameter][moment].fill_(step + 0.5)

    with open_engine(recipe) as engine:
        newest = latest_checkpoint(recipe.output_dir)
        assert newest is not None
        step = checkpoint_step(newest)
        last_losses = restore(engine, newest)
        if step > 1:
            assert last_losses == [float(step)]
            drafter = load_file(newest / "model.safetensors")
            for name, parameter in trainable(engine.module):
                state = engine.optimizer.state[parameter]
                assert torch.all(parameter == step)
                assert torch.all(drafter[name] == step)
                assert all(torch.all(state[moment] == step + 0.5) for moment in MOMENTS)
        checkpoints = CheckpointWriter(recipe.output_dir, recipe, 0, ["slipstream", "test"])
        if not after_first:
            begun.set()
        while True:
            step += 1
            mark(engine, step)
            checkpoints.write(engine, step, lambda step: f"{step}\n", [float(step)])
            begun.set()


@pytest.fixture(scope="module")
def target_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_target(tmp_path_factory.mktemp("target"))


def test_killed_ranks_checkpoint_restores(target_folder: Path, tmp_path: Path, chance: random.Random) -> None:
    recipe = make_recipe(target_folder, tmp_path / "run", max_steps=1, keep_checkpoints=2)
    train_group(recipe)
    for number in range(NUM_ENGINE_KILLS):
        kill_at_random(write_states_for_ever, (recipe,), chance, 0.3, after_first=number % 2 == 1)
    newest = latest_checkpoint(recipe.output_dir)
    assert newest is not None
    assert checkpoint_step(newest) > 1
    kill_at_random(write_states_for_ever, (recipe,), chance, 0.0)  # restores what the last kill left


def test_full_disk_publishes_no_half_checkpoint(target_folder: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk: the system refuses writes of safetensors and Python alike."""
    recipe = make_recipe(target_folder, tmp_path / "run", world_size=2, max_steps=4, checkpoint_every=1)
    with pytest.raises(AssertionError) as failure:
        train_group(recipe, on_report=fill_disk_at_step_3)
    assert str(failure.value).count("cannot write the checkpoint of step 3 to") == 2, "every rank says so"
    assert "File too large. What is not whole of it is removed" in str(failure.value)
    assert "lower trainer.keep_checkpoints, and give the same command again" in str(failure.value)
    assert latest_checkpoint(recipe.output_dir) == recipe.output_dir / "step_2"
    assert not [path for path in recipe.output_dir.iterdir() if path.name.startswith(".step")]
    [result, _] = train_group(recipe, recipe.output_dir / "step_2")
    assert (result["first_step"], result["steps"]) == (3, 4)


def fill_disk_at_step_3(step: int) -> None:
    if step == 3:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
