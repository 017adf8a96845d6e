"""Every recipe in the repository loads, fits its target, and has the settings of the checkpoint it is named after."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from services.contracts import TableSignature
from trainer.preparation import prepare
from trainer.recipe import load_recipe

ROOT = Path(__file__).parents[2]
DEMO_OF_A_CHECKOUT = ROOT / "infra" / "recipes" / "demo.yaml"
RECIPES = sorted(set((ROOT / "infra" / "recipes").glob("*.yaml")) - {DEMO_OF_A_CHECKOUT})
DEMO_RECIPES = sorted((ROOT / "trainer" / "demo").glob("*.yaml"))

# As the targets' own config.json have them.
TARGETS = {
    "Qwen/Qwen3-4B": {"num_hidden_layers": 36, "hidden_size": 2560},
    "Qwen/Qwen3-8B": {"num_hidden_layers": 36, "hidden_size": 4096},
    "Qwen/Qwen3-14B": {"num_hidden_layers": 40, "hidden_size": 5120},
}
RELEASED = {
    "dspark_qwen3_4b": ("Qwen/Qwen3-4B", (1, 9, 17, 25, 33)),
    "dspark_qwen3_8b": ("Qwen/Qwen3-8B", (1, 9, 17, 25, 33)),
    "dspark_qwen3_14b": ("Qwen/Qwen3-14B", (1, 10, 19, 28, 37)),
}


def write_config(folder: Path, model: str) -> None:
    """What of a released target is needed to check a recipe: no weights."""
    config = {"model_type": "qwen3", "vocab_size": 151936, "max_position_embeddings": 40960, **TARGETS[model]}
    (folder / "config.json").write_text(json.dumps(config))


def test_every_released_configuration_has_its_recipe() -> None:
    assert {path.stem for path in RECIPES} == set(RELEASED)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_has_the_released_settings(path: Path) -> None:
    recipe = load_recipe(path)
    model, layer_ids = RELEASED[path.stem]
    assert recipe.name == path.stem
    assert recipe.output_dir == Path("runs") / path.stem
    assert recipe.target.model == model
    drafter = recipe.drafter
    assert drafter.algorithm == "dspark"
    assert drafter.target_layer_ids == layer_ids
    assert (drafter.num_draft_layers, drafter.block_size, drafter.markov_rank, drafter.num_anchors) == (5, 7, 256, 512)
    assert (drafter.mask_token_id, drafter.markov_head_type) == (151669, "vanilla")
    assert (drafter.enable_confidence_head, drafter.confidence_head_with_markov) == (True, True)
    assert (drafter.ce_loss_alpha, drafter.l1_loss_alpha, drafter.confidence_head_alpha) == (0.1, 0.9, 1.0)
    assert drafter.loss_decay_gamma == 4.0
    prompts = recipe.prompts
    assert (prompts.epochs, prompts.max_length, prompts.min_loss_tokens, prompts.seed) == (10, 4096, 14, 42)
    assert prompts.system_prompt == "You are a helpful assistant."
    assert prompts.enable_thinking is False
    trainer = recipe.trainer
    assert (trainer.global_batch_size, trainer.learning_rate, trainer.seed) == (512, 6e-4, 42)
    assert (trainer.warmup_fraction, trainer.gradient_clip, trainer.weight_decay) == (0.04, 1.0, 0.0)
    assert trainer.precision == "bf16"
    assert trainer.max_steps is None


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_fits_its_target_and_its_node(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path)
    write_config(tmp_path, recipe.target.model)
    prepared = prepare(load_recipe(path, [f"target.model={tmp_path}"]))
    assert prepared.recipe.drafter == recipe.drafter  # nothing was left for `resolve` to fill in
    assert 2 * prepared.needed_buffer_bytes <= recipe.replay.capacity  # room for captures that run ahead
    num_gpus = (
        recipe.target.replicas * recipe.target.num_gpus
        + recipe.trainer.world_size * recipe.trainer.num_gpus
        + recipe.evaluation.num_gpus
    )
    assert num_gpus <= 8


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_states_the_bytes_of_its_features(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.drafter.target_layer_ids is not None
    signature = TableSignature(
        fingerprint="",
        layer_ids=recipe.drafter.target_layer_ids,
        hidden_size=TARGETS[recipe.target.model]["hidden_size"],
        dtype=recipe.replay.wire_dtype,
    )
    longest = recipe.prompts.max_length
    text = path.read_text()
    assert f"a token takes {signature.sample_bytes(1, 1) / 1e3:.1f} kB" in text
    assert f"a prompt of {longest} tokens {signature.sample_bytes(longest, longest) / 1e6:.0f} MB" in text


def test_demo_recipe_fits_the_target_it_ships_with() -> None:
    assert DEMO_RECIPES, "trainer/demo has no recipe"
    for path in DEMO_RECIPES:
        prepare(load_recipe(path, [f"target.model={path.parent / 'target'}"]))


def test_demo_recipe_of_a_checkout_is_the_one_that_ships() -> None:
    """A link, so that the two cannot drift apart; and from the checkout's root it finds its target."""
    assert DEMO_OF_A_CHECKOUT.read_bytes() == (ROOT / "trainer" / "demo" / "recipe.yaml").read_bytes()
    assert (ROOT / load_recipe(DEMO_OF_A_CHECKOUT).target.model / "config.json").exists()
