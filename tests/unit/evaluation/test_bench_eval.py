"""The benchmark's machinery on a few prompts; its figures are nobody's concern here."""

from pathlib import Path

import pytest
import torch

import trainer.demo
from drafters import save_drafter
from evaluation.bench import eval as bench
from evaluation.loading import load_target
from services.errors import CheckpointError

TARGET = Path(trainer.demo.__file__).parent / "target"


@pytest.fixture(autouse=True)
def few_prompts(monkeypatch):
    monkeypatch.setattr(bench, "BATCH_SIZE", 2)
    monkeypatch.setattr(bench, "NUM_PROMPTS", 4)
    monkeypatch.setattr(bench, "MAX_PROMPT_TOKENS", 60)


def test_both_sides_are_measured_in_both_batch_sizes():
    said = []
    result = bench.measure_evaluation(TARGET, None, said.append, turns=2, max_new_tokens=3)
    assert result["drafter"] == bench.UNTRAINED
    assert {side: set(speeds) for side, speeds in result["tokens_per_s"].items()} == {
        "speculative": {"1", "2"},
        "plain": {"1", "2"},
    }
    assert set(result["ratio"]) == {"speculative", "plain"}
    assert result["speedup"] > 0
    assert result["evaluation"]["num_prompts"] == 4
    assert result["evaluation"]["lossless"] is True
    assert [line for line in said if line.startswith("turn")] == ["turn 1 of 2", "turn 2 of 2"]


def test_folder_that_holds_no_drafter_of_the_target_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json"):
        bench.measure_evaluation(TARGET, tmp_path, print, turns=1, max_new_tokens=2)


def test_checkpoint_is_what_decodes(tmp_path):
    model = load_target(TARGET, torch.float32, torch.device("cpu"))
    save_drafter(bench._untrained(model, TARGET), tmp_path)
    result = bench.measure_evaluation(TARGET, tmp_path, lambda line: None, turns=1, max_new_tokens=2)
    assert result["drafter"] == str(tmp_path)
