from __future__ import annotations

import pytest
import torch
from tiny_decoding import tiny_target

from drafters.build import build_drafter
from drafters.drafter import Drafter
from evaluation.confidence.measuring import measure_step_times
from evaluation.ragged_target import RaggedTarget
from services.errors import UsageError

TARGET = tiny_target()


def dspark() -> Drafter:
    torch.manual_seed(0)
    return build_drafter(
        TARGET.config,
        algorithm="dspark",
        num_draft_layers=1,
        block_size=3,
        mask_token_id=1,
        markov_rank=4,
        target_layer_ids=(0, 1),
    ).eval()


def test_every_number_of_tokens_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
    extend = RaggedTarget.extend

    def noted(self: RaggedTarget, token_ids: torch.Tensor, starts: list[int]) -> torch.Tensor:
        passes.append((tuple(token_ids.shape), tuple(starts)))
        return extend(self, token_ids, starts)

    monkeypatch.setattr(RaggedTarget, "extend", noted)
    times = measure_step_times(TARGET, dspark(), 2, [3, 4, 5, 6, 7], tokens_observed=2, repeats=3)
    assert times.num_requests == 2
    assert len(times.verify_s) == 4
    assert min(times.verify_s) > 0
    assert times.draft_s > 0
    # Once to warm up, and three times; each pass stands after the context.
    assert passes == [((2, tokens), (5, 5)) for _ in range(4) for tokens in (1, 2, 3, 4)]


def test_context_is_cut_where_the_targets_ends() -> None:
    times = measure_step_times(TARGET, dspark(), 1, [3] * 1000, tokens_observed=1, repeats=1)
    assert len(times.verify_s) == 4


def test_requests_are_prefilled_in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evaluation.confidence.measuring.PREFILL_TOKENS", 8)
    groups: list[tuple[int, int]] = []
    prefill = RaggedTarget.prefill

    def noted(self: RaggedTarget, prompts: list[list[int]], first: int) -> torch.Tensor:
        groups.append((first, len(prompts)))
        return prefill(self, prompts, first)

    monkeypatch.setattr(RaggedTarget, "prefill", noted)
    measure_step_times(TARGET, dspark(), 5, [3, 4, 5, 6], tokens_observed=1, repeats=1)
    assert groups == [(0, 2), (2, 2), (4, 1)]


def test_context_without_room_for_a_step_is_refused() -> None:
    with pytest.raises(UsageError, match=r"context of 256 tokens has no room for the 404 that are measured"):
        measure_step_times(TARGET, dspark(), 1, [3], tokens_observed=4, repeats=99)
