from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_decoding import ScriptedDrafter, tiny_target

from drafters.build import build_drafter
from drafters.drafter import Proposal
from evaluation.batch_decoder import cut_below
from evaluation.confidence.temperatures import TEMPERATURES_NAME, ConfidenceTemperatures, check_num_temperatures
from evaluation.decode import speculative_generate
from services.errors import CheckpointError

FITTED = ConfidenceTemperatures(
    temperatures=(1.5, 0.75), decoding_temperature=1.0, tasks=("gsm8k",), num_samples=4, num_rounds=40
)


def test_saved_temperatures_are_read_back(tmp_path: Path) -> None:
    assert FITTED.save(tmp_path) == tmp_path / TEMPERATURES_NAME
    assert ConfidenceTemperatures.load(tmp_path) == FITTED
    assert [entry.name for entry in tmp_path.iterdir()] == [TEMPERATURES_NAME]


def test_folder_that_does_not_exist_says_how_to_go_on(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="--no-save"):
        FITTED.save(tmp_path / "missing")


def test_drafter_without_temperatures_says_how_to_fit_them(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"{tmp_path} has no {TEMPERATURES_NAME}: .* slipstream confidence"):
        ConfidenceTemperatures.load(tmp_path)


def test_temperatures_of_another_drafter_are_refused() -> None:
    check_num_temperatures((1.5, 0.75), 2, "run/step_9")
    with pytest.raises(
        CheckpointError, match="temperatures for 2 drafted tokens, but the drafter at run/step_9 drafts 7"
    ):
        check_num_temperatures((1.5, 0.75), 7, "run/step_9")


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        json.dumps({"temperatures": [1.0, 0.0]}),
        FITTED.model_dump_json().replace("0.75", "0"),
        FITTED.model_dump_json().replace("0.75", "-1"),
        FITTED.model_dump_json().replace("0.75", '"x"'),
        FITTED.model_dump_json().replace("0.75", "1e999"),
        FITTED.model_dump_json().replace("[1.5,0.75]", "[]"),
    ],
)
def test_spoiled_temperatures_are_named_with_the_way_out(tmp_path: Path, text: str) -> None:
    (tmp_path / TEMPERATURES_NAME).write_text(text)
    with pytest.raises(CheckpointError, match=r"holds no fitted temperatures: .* Fit them again"):
        ConfidenceTemperatures.load(tmp_path)


def test_threshold_compares_calibrated_confidences() -> None:
    # σ(2) = 0.88 and σ(1) = 0.73; over 4 they are 0.62 and 0.56.
    proposal = Proposal(torch.zeros(1, 2, dtype=torch.long), confidence=torch.tensor([[2.0, 1.0]]))
    raw, mended = cut_below(0.7), cut_below(0.7, (4.0, 4.0))
    assert raw is not None
    assert mended is not None
    assert raw(proposal).tolist() == [2]
    assert mended(proposal).tolist() == [0]
    assert cut_below(0.7, (1.0, 4.0))(proposal).tolist() == [1]  # type: ignore[misc]
    assert cut_below(0.0, (4.0, 4.0)) is None


def test_decoding_with_temperatures_verifies_other_drafts_and_gives_the_same_tokens() -> None:
    target = tiny_target()
    torch.manual_seed(0)
    drafter = build_drafter(
        target.config,
        algorithm="dspark",
        num_draft_layers=1,
        block_size=3,
        mask_token_id=1,
        markov_rank=4,
        target_layer_ids=(0, 1),
    ).eval()
    assert drafter.confidence_head is not None
    drafter.confidence_head.proj.weight.data.mul_(20)
    options = {"max_new_tokens": 16, "confidence_threshold": 0.6}
    raw = speculative_generate(target, drafter, [[3, 4, 5]], **options)
    mended = speculative_generate(target, drafter, [[3, 4, 5]], confidence_temperatures=(1e4, 1e4, 1e4), **options)
    assert raw.output_ids == mended.output_ids
    assert max(raw.proposal_lengths[0]) > 0
    assert max(mended.proposal_lengths[0]) == 0


def test_temperatures_for_another_number_of_drafts_are_refused() -> None:
    target = tiny_target()
    drafter = ScriptedDrafter(lambda num_context: [0, 0])
    with pytest.raises(
        ValueError, match=rf"2 confidence temperatures for a drafter that drafts {drafter.settings.num_drafts}"
    ):
        speculative_generate(target, drafter, [[3]], max_new_tokens=1, confidence_temperatures=(1.0, 1.0))
