from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from services.answers import AnswerWriter
from services.errors import PromptError
from services.prompts.config import PromptsConfig
from services.prompts.token_counts import count_answer_tokens

LINES = [
    {"messages": [{"role": "user", "content": "xyz"}, {"role": "assistant", "content": "aab"}]},
    {"messages": [{"role": "user", "content": "xyz"}, {"role": "assistant", "content": "ac"}]},
    {"turns": ["no answer here"]},
]


@pytest.fixture
def prompts(tmp_path: Path) -> PromptsConfig:
    source = tmp_path / "prompts.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return PromptsConfig(source=str(source), min_loss_tokens=2, system_prompt=None)


def by_text(folder: Path, counts: dict[int, int]) -> dict[str, int]:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return {tokenizer.id_to_token(token): count for token, count in counts.items()}


def test_answers_are_counted_and_questions_are_not(make_folder, prompts: PromptsConfig) -> None:
    folder = make_folder()
    counted = count_answer_tokens(prompts, folder)
    assert by_text(folder, counted.counts) == {"a": 3, "b": 1, "c": 1, "<|im_end|>": 2, "Ċ": 2}
    assert counted.num_conversations == 2


def test_conversations_that_the_run_skips_are_not_counted(make_folder, prompts: PromptsConfig) -> None:
    folder = make_folder()
    counted = count_answer_tokens(prompts.model_copy(update={"min_loss_tokens": 5}), folder)
    assert by_text(folder, counted.counts) == {"a": 2, "b": 1, "<|im_end|>": 1, "Ċ": 1}


def test_no_more_conversations_are_counted_than_asked_for(make_folder, prompts: PromptsConfig) -> None:
    folder = make_folder()
    every = [count_answer_tokens(prompts.model_copy(update={"seed": seed}), folder, most=2) for seed in range(12)]
    assert {counted.num_conversations for counted in every} == {1, 2}


def test_targets_own_answers_count_where_they_are_known(make_folder, prompts: PromptsConfig, tmp_path: Path) -> None:
    folder, answers = make_folder(), tmp_path / "answers.jsonl"
    writer = AnswerWriter(answers)
    writer.append(0, (7, 7, 9))
    writer.append(2, (9,))
    writer.close()
    own = prompts.model_copy(update={"answers": "target"})
    counted = count_answer_tokens(own, folder, answers)
    assert counted.num_conversations == 3
    assert (counted.counts[7], counted.counts[9]) == (2, 2)
    assert by_text(folder, counted.counts)["c"] == 1
    assert count_answer_tokens(own, folder, tmp_path / "none").num_conversations == 2


def test_source_without_answers_says_what_to_do(make_folder, prompts: PromptsConfig, tmp_path: Path) -> None:
    source = tmp_path / "questions.jsonl"
    source.write_text(json.dumps(LINES[2]) + "\n")
    with pytest.raises(PromptError, match=r"none of 1 conversations .*--draft-vocab-size"):
        count_answer_tokens(prompts.model_copy(update={"source": str(source)}), make_folder())
