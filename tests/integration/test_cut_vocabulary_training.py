"""Ranks that train a drafter whose vocabulary is cut."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rank_group import KEPT, keep_vocabulary, losses_of, make_recipe, save_target, train_group

from drafters import load_drafter
from services.errors import CheckpointError
from trainer.draft_vocabulary import FILE

STEPS = 4


def test_two_ranks_train_and_resume_over_a_cut_vocabulary(tmp_path: Path) -> None:
    target, output_dir = save_target(tmp_path / "target"), tmp_path / "run"
    keep_vocabulary(output_dir)
    settings = {"world_size": 2, "micro_batch_size": 2, "checkpoint_every": 2, "zero_stage": 1, "precision": "bf16"}
    train_group(make_recipe(target, output_dir, "eagle3_cut", max_steps=2, **settings))
    resumed = make_recipe(target, output_dir, "eagle3_cut", max_steps=STEPS, **settings)
    train_group(resumed, output_dir / "step_2")
    losses = losses_of(output_dir)
    assert set(losses) >= {3, 4}
    drafter = load_drafter(output_dir / f"step_{STEPS}", dtype=torch.float32)
    assert drafter.drafted_tokens.tolist() == list(KEPT)
    untrained = load_drafter(output_dir / "step_0", dtype=torch.float32)
    assert not torch.equal(drafter.fc.weight, untrained.fc.weight)
    assert torch.equal(drafter.lm_head.weight, untrained.lm_head.weight)


def test_missing_vocabulary_is_named(tmp_path: Path) -> None:
    from trainer.training import new_drafter

    recipe = make_recipe(save_target(tmp_path / "target"), tmp_path / "run", "eagle3_cut")
    with pytest.raises(CheckpointError, match=rf"{FILE} is no draft vocabulary of 24 tokens"):
        new_drafter(recipe, tmp_path / "run")
