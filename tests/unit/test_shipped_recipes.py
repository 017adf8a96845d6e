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
QWEN3 = {"model_type": "qwen3", "vocab_size": 151936, "max_position_embeddings": 40960}
GEMMA4 = {"model_type": "gemma4_unified_text", "vocab_size": 262144, "max_position_embeddings": 262144}
TARGETS = {
    "Qwen/Qwen3-4B": {**QWEN3, "num_hidden_layers": 36, "hidden_size": 2560},
    "Qwen/Qwen3-8B": {**QWEN3, "num_hidden_layers": 36, "hidden_size": 4096},
    "Qwen/Qwen3-14B": {**QWEN3, "num_hidden_layers": 40, "hidden_size": 5120},
    "google/gemma-4-12B-it": {**GEMMA4, "num_hidden_layers": 48, "hidden_size": 3840},
}
CAPTURED = {
    "qwen3_4b": ("Qwen/Qwen3-4B", (1, 9, 17, 25, 33)),
    "qwen3_8b": ("Qwen/Qwen3-8B", (1, 9, 17, 25, 33)),
    "qwen3_14b": ("Qwen/Qwen3-14B", (1, 10, 19, 28, 37)),
    "gemma4_12b": ("google/gemma-4-12B-it", (5, 17, 29, 41, 46)),
}
RELEASED = {
    f"{algorithm}_{name}": (algorithm, *captured)
    for algorithm in ("dspark", "dflash", "eagle3")
    for name, captured in CAPTURED.items()
}
SETTINGS = {
    "dspark": {
        "num_draft_layers": 5,
        "block_size": 7,
        "num_anchors": 512,
        "sample_from_anchor": True,
        "markov_rank": 256,
        "markov_head_type": "vanilla",
        "enable_confidence_head": True,
        "confidence_head_with_markov": True,
        "loss_decay_gamma": 4.0,
        "ce_loss_alpha": 0.1,
        "l1_loss_alpha": 0.9,
        "confidence_head_alpha": 1.0,
    },
    "dflash": {
        "num_draft_layers": 5,
        "block_size": 7,
        "num_anchors": 512,
        "sample_from_anchor": True,
        "markov_rank": 0,
        "enable_confidence_head": False,
        "loss_decay_gamma": 4.0,
        "ce_loss_alpha": 1.0,
        "l1_loss_alpha": 0.0,
    },
    "eagle3": {"num_draft_layers": 1, "ttt_length": 7, "step_loss_decay": 0.8, "layout": "reference"},
}


def write_config(folder: Path, model: str) -> None:
    """What of a released target is needed to check a recipe: no weights."""
    (folder / "config.json").write_text(json.dumps(TARGETS[model]))


def test_every_released_configuration_has_its_recipe() -> None:
    assert len(RELEASED) == 12
    assert {path.stem for path in RECIPES} == set(RELEASED)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_has_the_released_settings(path: Path) -> None:
    recipe = load_recipe(path)
    algorithm, model, layer_ids = RELEASED[path.stem]
    assert recipe.name == path.stem
    assert recipe.output_dir == Path("runs") / path.stem
    assert recipe.target.model == model
    drafter = recipe.drafter
    assert drafter.algorithm == algorithm
    assert drafter.target_layer_ids == layer_ids
    gemma = "gemma" in model
    assert drafter.mask_token_id == (None if algorithm == "eagle3" else 4 if gemma else 151669)
    assert {name: getattr(drafter, name) for name in SETTINGS[algorithm]} == SETTINGS[algorithm]
    seed = 0 if algorithm == "eagle3" else 42
    prompts = recipe.prompts
    assert (prompts.epochs, prompts.max_length, prompts.min_loss_tokens, prompts.seed) == (10, 4096, 14, seed)
    assert prompts.system_prompt == (None if gemma else "You are a helpful assistant.")
    assert prompts.enable_thinking is False
    trainer = recipe.trainer
    assert (trainer.global_batch_size, trainer.learning_rate, trainer.seed) == (512, 6e-4, seed)
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
