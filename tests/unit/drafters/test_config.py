from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from drafters.config import DrafterConfig, spread_layer_ids

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
