from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from drafters.config import DrafterConfig, default_layer_ids, settings_of, spread_layer_ids

QWEN3_4B: dict[str, Any] = {"num_target_layers": 36, "vocab_size": 151936, "model_type": "qwen3"}


@pytest.mark.parametrize(
    ("num_target_layers", "expected"),
    [
        (36, (1, 9, 17, 25, 33)),  # Qwen3-4B and 8B
        (40, (1, 10, 19, 28, 37)),  # Qwen3-14B
        (8, (1, 2, 3, 4, 5)),
        (12, (1, 3, 5, 7, 9)),
    ],
)
def test_layer_ids_spread_evenly(num_target_layers: int, expected: tuple[int, ...]) -> None:
    assert spread_layer_ids(num_target_layers) == expected


@pytest.mark.parametrize("num_target_layers", [1, 3, 7])
def test_layer_ids_are_refused_to_spread_over_a_shallow_target(num_target_layers: int) -> None:
    with pytest.raises(ValueError, match=f"target of {num_target_layers} layers is too shallow"):
        spread_layer_ids(num_target_layers)


def test_resolve_fills_in_layer_ids_and_mask_token_and_nothing_else() -> None:
    given = DrafterConfig(markov_rank=8)
    resolved = given.resolve(**QWEN3_4B)
    assert resolved.target_layer_ids == (1, 9, 17, 25, 33)
    assert resolved.mask_token_id == 151669
    assert resolved == given.model_copy(update={"target_layer_ids": (1, 9, 17, 25, 33), "mask_token_id": 151669})


def test_resolve_keeps_what_is_given() -> None:
    given = DrafterConfig(target_layer_ids=(-1, 0, 34), mask_token_id=0)
    assert given.resolve(**QWEN3_4B) == given


@pytest.mark.parametrize(
    "layer_ids",
    [
        (1, 35),  # the last layer is never captured
        (1, 99),
        (-2, 1),
    ],
)
def test_resolve_refuses_layer_ids_outside_the_target(layer_ids: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"must lie between -1 \(the embedding\) and 34") as caught:
        DrafterConfig(target_layer_ids=layer_ids).resolve(**QWEN3_4B)
    assert f"drafter.target_layer_ids {list(layer_ids)}" in str(caught.value)


@pytest.mark.parametrize("layer_ids", [(9, 1), (1, 1, 9)])
def test_resolve_refuses_layer_ids_that_do_not_ascend(layer_ids: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="must ascend without repeats"):
        DrafterConfig(target_layer_ids=layer_ids).resolve(**QWEN3_4B)


@pytest.mark.parametrize(
    ("model_type", "num_target_layers", "expected"),
    [
        ("gemma4_unified_text", 48, (5, 17, 29, 41, 46)),  # Gemma-4-12B as released
        ("gemma4_text", 48, (5, 17, 29, 41, 46)),
        ("gemma4_text", 30, (1, 8, 14, 20, 27)),  # 1 + i · 26/4 = 1, 7.5, 14, 20.5, 27: Python rounds to even
        ("qwen3", 48, (1, 12, 23, 34, 45)),
    ],
)
def test_default_layer_ids_are_the_released_ones_or_spread(model_type, num_target_layers, expected) -> None:
    assert default_layer_ids(num_target_layers, model_type) == expected
    resolved = DrafterConfig(mask_token_id=0).resolve(
        num_target_layers=num_target_layers, vocab_size=10, model_type=model_type
    )
    assert resolved.target_layer_ids == expected


def test_default_mask_tokens_are_the_families() -> None:
    for model_type, expected in {
        "gemma4_unified_text": 4,
        "gemma4_text": 4,
        "qwen3": 151669,
        "qwen3_moe": 151669,
    }.items():
        resolved = DrafterConfig().resolve(num_target_layers=36, vocab_size=151936, model_type=model_type)
        assert resolved.mask_token_id == expected


def test_dflash_has_no_heads_and_cross_entropy_alone() -> None:
    config = DrafterConfig(algorithm="dflash")
    assert (config.markov_rank, config.enable_confidence_head) == (0, False)
    assert (config.ce_loss_alpha, config.l1_loss_alpha, config.confidence_head_alpha) == (1.0, 0.0, 0.0)
    assert (config.num_draft_layers, config.block_size, config.num_anchors) == (5, 7, 512)
    assert DrafterConfig.model_validate(config.model_dump()) == config


def test_eagle3_has_one_layer_and_needs_no_mask_token() -> None:
    config = DrafterConfig(algorithm="eagle3")
    assert (config.num_draft_layers, config.ttt_length, config.step_loss_decay) == (1, 7, 0.8)
    resolved = config.resolve(num_target_layers=36, vocab_size=100, model_type="something")
    assert (resolved.target_layer_ids, resolved.mask_token_id) == ((1, 9, 17, 25, 33), None)
    assert DrafterConfig.model_validate(resolved.model_dump()) == resolved


def test_eagle3_llama_layout_captures_three_layers() -> None:
    config = DrafterConfig(algorithm="eagle3", layout="llama")
    assert config.resolve(**QWEN3_4B).target_layer_ids == (1, 17, 33)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_layer_ids": (1, 9, 17)}, r"must be 5 layers for Eagle3's layout 'reference', not 3"),
        ({"target_layer_ids": (1, 9, 17, 25, 33), "layout": "llama"}, "must be 3 layers.*'llama', not 5"),
        ({"target_layer_ids": (-1, 9, 17, 25, 33)}, "must lie between 0 and 34"),
    ],
)
def test_eagle3_refuses_layers_that_its_layout_has_no_place_for(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DrafterConfig(algorithm="eagle3", **settings).resolve(**QWEN3_4B)


@pytest.mark.parametrize(
    ("algorithm", "setting"),
    [
        ("dflash", {"markov_rank": 256}),
        ("dflash", {"enable_confidence_head": True, "confidence_head_with_markov": False}),
        ("dflash", {"ttt_length": 5}),
        ("eagle3", {"block_size": 5}),
        ("eagle3", {"warm_start_layers": (0,)}),
        ("eagle3", {"markov_head_type": "rnn"}),
        ("dspark", {"layout": "llama"}),
    ],
)
def test_setting_of_another_algorithm_is_refused_by_name(algorithm: str, setting: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=f"{next(iter(setting))}.*: no setting of {algorithm}"):
        DrafterConfig.model_validate({"algorithm": algorithm, **setting})


def test_settings_of_keeps_what_another_algorithm_has_too() -> None:
    section = {"algorithm": "dspark", "num_anchors": 32, "markov_rank": 64, "target_layer_ids": [0, 2], "loss": "plain"}
    kept = {"num_anchors": 32, "target_layer_ids": [0, 2], "loss": "plain"}
    assert settings_of("dflash", section) == kept | {"algorithm": "dflash"}
    assert settings_of("eagle3", section) == {"algorithm": "eagle3", "target_layer_ids": [0, 2], "loss": "plain"}
    assert DrafterConfig(**settings_of("dflash", section)).num_anchors == 32


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"block_size": 5}, 5),
        ({"block_size": 5, "sample_from_anchor": False}, 4),
        ({"algorithm": "eagle3", "ttt_length": 6}, 6),
    ],
)
def test_a_proposal_has_a_token_for_each_slot_that_predicts(settings: dict[str, Any], expected: int) -> None:
    assert DrafterConfig(**settings).num_drafts == expected


def test_block_of_one_mask_drafts_nothing_and_is_refused() -> None:
    assert DrafterConfig(block_size=1).num_drafts == 1
    with pytest.raises(ValidationError, match="drafts nothing: slot 0 is not predicted"):
        DrafterConfig(block_size=1, sample_from_anchor=False)


def test_empty_layer_ids_are_refused() -> None:
    """An empty list is a mistake, not a wish for the default."""
    with pytest.raises(ValueError, match="target_layer_ids"):
        DrafterConfig(target_layer_ids=()).resolve(**QWEN3_4B)


@pytest.mark.parametrize("mask_token_id", [-1, 151936])
def test_resolve_refuses_a_mask_token_outside_the_vocabulary(mask_token_id: int) -> None:
    with pytest.raises(ValueError, match=f"mask_token_id {mask_token_id} is outside the target's vocabulary of 151936"):
        DrafterConfig(mask_token_id=mask_token_id).resolve(**QWEN3_4B)


def test_resolve_wants_a_mask_token_for_an_unknown_family() -> None:
    with pytest.raises(ValueError, match="no default for model type 'mamba'"):
        DrafterConfig().resolve(num_target_layers=36, vocab_size=1000, model_type="mamba")


@pytest.mark.parametrize(
    "wrong",
    [
        {"block_size": 0},
        {"num_anchors": 0},
        {"num_draft_layers": 0},
        {"markov_rank": -1},
        {"markov_head_type": "lstm"},
        {"algorithm": "medusa"},
        {"loss_decay_gamma": 0},
        {"l1_loss_alpha": -0.1},
        {"gamma": 7},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_setting_out_of_bounds_is_refused_by_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        DrafterConfig(**wrong)


def test_confidence_head_on_a_markov_head_that_is_left_out_is_refused() -> None:
    with pytest.raises(ValidationError, match="markov_rank is 0: set confidence_head_with_markov to false"):
        DrafterConfig(markov_rank=0)


@pytest.mark.parametrize("without", ["enable_confidence_head", "confidence_head_with_markov"])
def test_markov_head_may_be_left_out_when_no_confidence_head_needs_it(without: str) -> None:
    assert DrafterConfig.model_validate({"markov_rank": 0, without: False}).markov_rank == 0
