from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from services.errors import RecipeError, TargetError
from trainer.preparation import prepare
from trainer.recipe import Recipe


@pytest.fixture
def target(tmp_path: Path) -> str:
    config = {"model_type": "qwen3", "num_hidden_layers": 8, "hidden_size": 64, "vocab_size": 160_000}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return str(tmp_path)


def recipe(target: str, **replay: Any) -> Recipe:
    return Recipe.model_validate({"target": {"model": target}, "prompts": {"source": "stdlib"}, "replay": replay})


def test_chunk_that_holds_no_token_is_refused(target: str) -> None:
    """Five layers of width 64 in bfloat16 are 640 bytes a token."""
    assert prepare(recipe(target, chunk=640)).signature.context_row_bytes == 640
    with pytest.raises(RecipeError, match=r"replay.chunk 639 cannot hold one token's features.*are 640 bytes"):
        prepare(recipe(target, chunk=639))


def write_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_layer_ids_and_mask_token_get_their_defaults(target: str) -> None:
    """Five of eight layers: 1, 2, 3, 4, 5. Qwen3's mask token is 151669."""
    prepared = prepare(recipe(target))
    assert prepared.recipe.drafter.target_layer_ids == (1, 2, 3, 4, 5)
    assert prepared.recipe.drafter.mask_token_id == 151669
    assert prepared.signature.layer_ids == (1, 2, 3, 4, 5)
    assert prepared.last_rows == "between"


def test_layer_ids_of_a_deeper_target_are_refused(target: str) -> None:
    settings = recipe(target).model_dump(mode="json") | {"drafter": {"target_layer_ids": [1, 7]}}
    with pytest.raises(RecipeError, match=r"target_layer_ids \[1, 7\].*between -1 .* and 6.*8 layers"):
        prepare(Recipe.model_validate(settings))


def test_mask_token_outside_the_vocabulary_is_refused(target: str) -> None:
    write_config(Path(target), vocab_size=1000)
    with pytest.raises(RecipeError, match="mask_token_id 151669 is outside the target's vocabulary of 1000"):
        prepare(recipe(target))


def test_target_of_a_family_without_drafters_is_refused(target: str) -> None:
    write_config(Path(target), model_type="mamba")
    with pytest.raises(RecipeError, match=r"'mamba' are not known here.*no number for .*num_attention_heads"):
        prepare(recipe(target))


def test_prompts_longer_than_the_targets_context_are_refused(target: str) -> None:
    write_config(Path(target), max_position_embeddings=4096)
    assert prepare(recipe(target)).shape.max_tokens == 4096
    write_config(Path(target), max_position_embeddings=4095)
    with pytest.raises(RecipeError, match="max_length 4096 is more than the target's context of 4095"):
        prepare(recipe(target))


def test_capacity_holds_exactly_the_micro_batches_in_flight(target: str) -> None:
    """One rank, micro-batches of 1, two ahead: four samples of 4096 tokens, 5 + 1 rows of 64 bf16 numbers a token."""
    needed = 4 * 4096 * (5 + 1) * 64 * 2
    assert prepare(recipe(target, capacity=needed)).needed_buffer_bytes == needed
    with pytest.raises(RecipeError, match=f"micro-batches in flight: {needed} bytes .* 1 samples of up to 4096 tokens"):
        prepare(recipe(target, capacity=needed - 1))


def test_each_shard_must_hold_what_ranks_have_out_at_once(target: str) -> None:
    one = 4 * 4096 * (5 + 1) * 64 * 2
    assert prepare(recipe(target, capacity=3 * one, shards=3)).needed_buffer_bytes == 3 * one
    with pytest.raises(
        RecipeError, match=rf"{3 * one} bytes \(.*\), {one} on each of replay.shards 3, .*lower .*shards"
    ):
        prepare(recipe(target, capacity=3 * one - 1, shards=3))


def test_target_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"config\.json"):
        prepare(recipe(str(tmp_path)))
