from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from services.answers import AnswerWriter
from services.errors import CheckpointError, PromptError, RecipeError
from services.prompts.token_counts import TokenCounts
from trainer.draft_vocabulary import FILE, choose, ensure_vocabulary
from trainer.recipe import Recipe

DEMO_TARGET = Path(__file__).parents[3] / "trainer" / "demo" / "target"


def recipe(tmp_path: Path, size: int | None = 300, **prompts: Any) -> Recipe:
    source = tmp_path / "prompts.jsonl"
    lines = [
        {"messages": [{"role": "user", "content": "say"}, {"role": "assistant", "content": f"return {text} " * 9}]}
        for text in ("self", "value", "self")
    ]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    drafter = {"algorithm": "eagle3"} | ({"draft_vocab_size": size} if size else {})
    return Recipe.model_validate(
        {"target": {"model": str(DEMO_TARGET)}, "prompts": {"source": str(source)} | prompts, "drafter": drafter}
    )


def test_nothing_is_made_without_a_cut(tmp_path: Path) -> None:
    assert ensure_vocabulary(recipe(tmp_path, None), DEMO_TARGET, tmp_path, None) is None
    assert not (tmp_path / FILE).exists()


def test_vocabulary_is_chosen_once_and_stays(tmp_path: Path) -> None:
    first = ensure_vocabulary(recipe(tmp_path), DEMO_TARGET, tmp_path, None)
    assert first is not None
    assert len(first.tokens) == 300
    assert first.share == 1.0
    assert first.num_conversations == 3
    (tmp_path / "prompts.jsonl").unlink()
    again = recipe_without_prompts(tmp_path)
    assert ensure_vocabulary(again, DEMO_TARGET, tmp_path, None) == first


def recipe_without_prompts(tmp_path: Path) -> Recipe:
    return Recipe.model_validate(
        {
            "target": {"model": str(DEMO_TARGET)},
            "prompts": {"source": str(tmp_path / "prompts.jsonl")},
            "drafter": {"algorithm": "eagle3", "draft_vocab_size": 300},
        }
    )


def test_checkpoint_gives_it_where_the_file_was_lost(tmp_path: Path) -> None:
    checkpoint = tmp_path / "step_3"
    checkpoint.mkdir()
    tokens = torch.arange(300) * 2
    save_file({"d2t": tokens - torch.arange(300)}, checkpoint / "model.safetensors")
    found = ensure_vocabulary(recipe(tmp_path), DEMO_TARGET, tmp_path, checkpoint)
    assert found is not None
    assert found.tokens == tuple(tokens.tolist())
    assert (tmp_path / FILE).exists()


def with_answers(folder: Path, answers: dict[int, tuple[int, ...]]) -> None:
    writer = AnswerWriter(folder / "answers.jsonl")
    for prompt, tokens in answers.items():
        writer.append(prompt, tokens)
    writer.close()


def test_targets_own_answers_are_counted_where_the_run_has_some(tmp_path: Path) -> None:
    own = tuple(range(222, 512))
    with_answers(tmp_path, {0: own, 2: own})
    found = ensure_vocabulary(recipe(tmp_path, answers="target"), DEMO_TARGET, tmp_path, None)
    assert found is not None
    assert set(found.tokens) >= set(own)
    assert found.num_conversations == 3


def test_targets_own_answers_are_passed_over_where_the_data_is_trained_on(tmp_path: Path) -> None:
    own = tuple(range(222, 512))
    without = ensure_vocabulary(recipe(tmp_path), DEMO_TARGET, tmp_path, None)
    (tmp_path / FILE).unlink()
    with_answers(tmp_path, {0: own, 2: own})
    assert ensure_vocabulary(recipe(tmp_path), DEMO_TARGET, tmp_path, None) == without


def test_first_run_on_questions_alone_is_refused_with_the_way_out(tmp_path: Path) -> None:
    asked = recipe(tmp_path, answers="target")
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "say"}]}) + "\n")
    with pytest.raises(PromptError, match=r"none of 1 conversations .* slipstream export --draft-vocab-size"):
        ensure_vocabulary(asked, DEMO_TARGET, tmp_path, None)
    assert not (tmp_path / FILE).exists()


def test_stop_tokens_are_kept_whatever_was_counted() -> None:
    stop = json.loads((DEMO_TARGET / "generation_config.json").read_text())["eos_token_id"]
    stops = set(stop if isinstance(stop, list) else [stop])
    counted = TokenCounts({400: 5, 401: 4, 402: 3}, 1)
    chosen = choose(len(stops) + 1, DEMO_TARGET, counted)
    assert set(chosen.tokens) == stops | {400}
    assert chosen.share == pytest.approx(5 / 12)


def test_size_below_the_stop_tokens_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.draft_vocabulary.find_stop_token_ids", lambda folder: (1, 2, 3))
    with pytest.raises(RecipeError, match="draft_vocab_size 2: cannot keep 2 tokens"):
        choose(2, DEMO_TARGET, TokenCounts({5: 1}, 1))


@pytest.mark.parametrize("text", ["{", '{"tokens": [1, 2]}', '{"tokens": [2, 1]}', '{"tokens": [-1]}'])
def test_spoiled_file_is_named_with_the_way_out(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE).write_text(text)
    with pytest.raises(CheckpointError, match=rf"{FILE} is no draft vocabulary of 300 tokens: .*remove it"):
        ensure_vocabulary(recipe(tmp_path), DEMO_TARGET, tmp_path, None)
