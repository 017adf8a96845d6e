"""How much is ahead of the step, and what the buffer must hold for it."""

from __future__ import annotations

from typing import Any

import pytest

from services.contracts import TableSignature, WireDtype
from trainer.depth import needed_buffer_bytes, prefetch_bytes
from trainer.recipe import Recipe

TOKENS = 2 * 100
"""Of the longest micro-batch."""


def signature(dtype: WireDtype = "bf16") -> TableSignature:
    """4 rows of 8 numbers a token, the last hidden state included."""
    return TableSignature(fingerprint="f", layer_ids=(0, 1, 2), hidden_size=8, dtype=dtype)


def recipe(**trainer: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "target": {"model": "m"},
            "prompts": {"source": "p", "max_length": 100},
            "trainer": {"micro_batch_size": 2, "global_batch_size": 4} | trainer,
        }
    )


def test_two_of_the_longest_micro_batches_are_ahead_unless_told_otherwise() -> None:
    assert prefetch_bytes(recipe(), signature()) == 2 * TOKENS * 4 * 8 * 2
    assert prefetch_bytes(recipe(precision="fp32"), signature()) == 2 * TOKENS * 4 * 8 * 4
    assert prefetch_bytes(recipe(prefetch="3MiB"), signature()) == 3 * 2**20


def test_buffer_holds_what_is_ahead_one_in_training_and_one_being_leased_of_every_rank() -> None:
    assert needed_buffer_bytes(recipe(), signature()) == 4 * TOKENS * 4 * 8 * 2
    assert needed_buffer_bytes(recipe(world_size=2), signature()) == 2 * 4 * TOKENS * 4 * 8 * 2


def test_buffer_counts_bytes_as_they_travelled() -> None:
    assert needed_buffer_bytes(recipe(precision="fp32"), signature()) == needed_buffer_bytes(recipe(), signature())
    longest = TOKENS * 4 * 8
    assert needed_buffer_bytes(recipe(precision="fp32", prefetch=40 * longest), signature()) == (20 + 2 * 2) * longest
    assert needed_buffer_bytes(recipe(prefetch=20 * longest), signature("fp32")) == (40 + 2 * 4) * longest


def test_one_micro_batch_is_ahead_whatever_the_depth() -> None:
    longest = TOKENS * 4 * 8 * 2
    assert needed_buffer_bytes(recipe(prefetch=longest // 2), signature()) == 3 * longest


@pytest.mark.parametrize("prefetch", [2, "1000B"])
def test_prefetch_in_micro_batches_is_refused(prefetch: object) -> None:
    with pytest.raises(ValueError, match=r"prefetch is in bytes, not in micro-batches\. Leave it out"):
        recipe(prefetch=prefetch)
