from __future__ import annotations

import json

import pytest

from services.answers import AnswerBook, AnswerWriter
from services.contracts import LastRows
from services.errors import PromptError
from services.prompts.chat import ChatEncoder, UnusablePromptError
from services.prompts.config import PromptsConfig
from services.prompts.intake import Intake, OwnAnswers, first_turns
from services.prompts.sources import load_conversations


def setup(make_folder, tmp_path, lines, **settings):
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = PromptsConfig(source=str(path), system_prompt=None, **settings)
    conversations = load_conversations(str(path), split="train", strict=False)
    encoder = ChatEncoder(make_folder(), system_prompt=None, enable_thinking=False)
    return Intake(conversations, encoder, config, LastRows.BETWEEN), conversations, encoder, path


def chat(*contents: str) -> dict[str, object]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]}


def job(intake: Intake, prompt: int, **changes):
    return intake.job(**({"capture": 9, "attempt": 2, "prompt": prompt, "epoch": 1, "reuse": 2, "ks": None} | changes))


def test_job_carries_what_a_capture_needs(make_folder, tmp_path):
    intake, *_ = setup(make_folder, tmp_path, [chat("u", "ab")], min_loss_tokens=4)
    made = job(intake, 0, ks=(1,))
    assert (made.capture, made.attempt, made.prompt, made.epoch, made.reuse, made.ks) == (9, 2, 0, 1, 2, (1,))
    assert made.num_tokens == len(made.loss_mask) == 24
    assert made.loss_mask == (0,) * 20 + (1,) * 4
    assert made.last_rows == (20, 21, 22)


@pytest.mark.parametrize(
    ("settings", "reason", "detail"),
    [
        ({"max_length": 23, "min_loss_tokens": 4}, "too long", "24 tokens, above prompts.max_length 23"),
        ({"min_loss_tokens": 5}, "too few loss tokens", "4 loss tokens, below prompts.min_loss_tokens 5"),
    ],
)
def test_lengths_out_of_bounds_name_the_line(make_folder, tmp_path, settings, reason, detail):
    intake, _, _, path = setup(make_folder, tmp_path, [chat("u", "a much longer answer"), chat("u", "ab")], **settings)
    with pytest.raises(UnusablePromptError) as caught:
        job(intake, 1)
    assert caught.value.reason == reason
    assert caught.value.detail == f"{path}:2: {detail}"
    with pytest.raises(UnusablePromptError) as again:  # another epoch: known without encoding it once more
        job(intake, 1, epoch=2)
    assert again.value is caught.value


def test_length_at_the_bounds_is_taken(make_folder, tmp_path):
    intake, *_ = setup(make_folder, tmp_path, [chat("u", "ab")], max_length=24, min_loss_tokens=4)
    assert job(intake, 0).num_tokens == 24


def test_first_turns_are_seeded_cut_and_carry_the_generation_prompt(make_folder, tmp_path):
    lines = [chat(f"question {number}", "answer", "more", "yes") for number in range(8)]
    lines.append({"messages": [{"role": "system", "content": "s"}, {"role": "assistant", "content": "b"}]})
    lines[0] |= {"domain": "math"}
    lines[1] |= {"domain": 7}
    _, conversations, encoder, _ = setup(make_folder, tmp_path, lines)
    turns = [encoder.encode_prompt([{"role": "user", "content": f"question {number}"}]) for number in range(8)]

    def take(count: int, seed: int = 1, max_length: int = 100) -> list[list[int]]:
        prompts = first_turns(conversations, encoder, count=count, seed=seed, max_length=max_length)
        assert all((prompt.domain == "math") == (prompt.token_ids == turns[0]) for prompt in prompts)
        assert {prompt.domain for prompt in prompts} <= {"math", "all"}
        return [prompt.token_ids for prompt in prompts]

    assert sorted(take(99)) == sorted(turns)
    assert take(3) == take(99)[:3]
    assert take(99) != take(99, seed=2)
    assert take(0) == []
    with pytest.raises(PromptError, match="none of the 9 held-out conversations begins with a user turn of at most 5"):
        take(1, max_length=5)


def own_answers_setup(make_folder, tmp_path, lines, **settings):
    _, conversations, encoder, _ = setup(make_folder, tmp_path, lines)
    config = PromptsConfig(source="unused", system_prompt=None, answers="target", **settings)
    own = OwnAnswers(AnswerBook(tmp_path / "answers.jsonl"), stop_token_ids=(5,))
    return Intake(conversations, encoder, config, LastRows.BETWEEN, own), encoder


def test_target_answers_a_prompt_until_its_answer_is_known(make_folder, tmp_path):
    intake, encoder = own_answers_setup(
        make_folder, tmp_path, [chat("u", "ab")], min_loss_tokens=2, max_length=25, max_new_tokens=100
    )
    question = tuple(encoder.encode_prompt([{"role": "user", "content": "u"}]))
    made = job(intake, 0)
    assert (made.input_ids, made.loss_mask, made.last_rows) == (question, (0,) * len(question), ())
    assert made.generate.max_new_tokens == 25 - len(question)
    assert (made.generate.min_new_tokens, made.generate.stop_token_ids) == (2, (5,))
    assert job(intake, 0, epoch=3).generate.seed == made.generate.seed  # the same answer whenever it is asked

    AnswerWriter(tmp_path / "answers.jsonl").append(0, (8, 9, 5))
    assert job(intake, 0) == made.answered([8, 9, 5])


def test_answer_too_short_to_learn_from_is_skipped(make_folder, tmp_path):
    intake, _ = own_answers_setup(make_folder, tmp_path, [chat("u", "ab")], min_loss_tokens=4)
    AnswerWriter(tmp_path / "answers.jsonl").append(0, (8, 9, 5))
    with pytest.raises(UnusablePromptError) as caught:
        job(intake, 0)
    assert caught.value.reason == "too few loss tokens"


def test_prompt_that_leaves_no_room_for_an_answer_is_too_long(make_folder, tmp_path):
    intake, _ = own_answers_setup(make_folder, tmp_path, [chat("u", "ab")], min_loss_tokens=4, max_length=22)
    with pytest.raises(UnusablePromptError) as caught:
        job(intake, 0)
    assert caught.value.reason == "too long"
    assert "below prompts.min_loss_tokens 4" in caught.value.detail
