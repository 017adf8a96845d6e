from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
from untrained import DEMO_TARGET, write_turns

from evaluation.benchmark import BenchmarkSettings, PromptFile, choose, plan_task
from evaluation.tasks import MATH_SUFFIX, SEED, TASKS
from services.errors import PromptError
from services.prompts.chat import ChatEncoder


def encoder(*, enable_thinking: bool = False, folder: Path = DEMO_TARGET) -> ChatEncoder:
    return ChatEncoder(folder, system_prompt=None, enable_thinking=enable_thinking)


def plan(folder: Path, task: str, **changes):
    options = {"seed": SEED, "max_samples": None, "max_tokens": 0} | changes
    return plan_task(TASKS[task], folder / f"{task}.jsonl", encoder(), **options)


def test_first_turns_are_encoded_with_the_generation_prompt_and_no_system_prompt(tmp_path):
    folder = write_turns(tmp_path, mbpp=["Write f.", "Write g."])
    planned = plan(folder, "mbpp")
    expected = encoder().encode_prompt([{"role": "user", "content": "Write f."}])
    assert list(planned.samples[0].prompt_ids) == expected
    assert [(sample.index, sample.seed) for sample in planned.samples] == [(0, SEED), (1, SEED + 1)]
    assert (planned.domain, planned.num_skipped) == ("code", 0)


def test_math_prompts_get_their_instruction(tmp_path):
    folder = write_turns(tmp_path, gsm8k=["1+1?"])
    expected = encoder().encode_prompt([{"role": "user", "content": f"1+1?{MATH_SUFFIX}"}])
    assert list(plan(folder, "gsm8k").samples[0].prompt_ids) == expected


def test_rows_are_shuffled_only_when_cut():
    order = list(range(10))
    random.Random(SEED).shuffle(order)
    assert choose(10, 4, SEED) == order[:4]
    assert choose(10, 10, SEED) == choose(10, None, SEED) == list(range(10))


def test_cut_task_keeps_seeds_by_index_after_the_shuffle(tmp_path):
    prompts = [f"Write f{i}." for i in range(9)]
    few, more = (plan(write_turns(tmp_path, mbpp=prompts), "mbpp", max_samples=n).samples for n in (2, 5))
    assert few == more[:2]
    rows = list(prompts)
    random.Random(SEED).shuffle(rows)
    assert list(few[1].prompt_ids) == encoder().encode_prompt([{"role": "user", "content": rows[1]}])
    assert few[1].seed == SEED + 1


def test_task_takes_no_more_than_its_published_count(tmp_path):
    folder = write_turns(tmp_path, aime25=[f"x{i}" for i in range(40)])
    assert len(plan(folder, "aime25").samples) == len(plan(folder, "aime25", max_samples=99).samples) == 30


def test_prompts_longer_than_the_context_are_skipped_and_counted(tmp_path):
    folder = write_turns(tmp_path, mbpp=["a", "long " * 200, "b"])
    planned = plan(folder, "mbpp", max_tokens=60)
    assert [sample.index for sample in planned.samples] == [0, 2]
    assert planned.num_skipped == 1


def test_task_of_nothing_but_long_prompts_is_an_error(tmp_path):
    folder = write_turns(tmp_path, mbpp=["long " * 200])
    with pytest.raises(PromptError, match=r"all 1 prompts of mbpp are longer than the target's context of 60 tokens"):
        plan(folder, "mbpp", max_tokens=60)


def test_empty_prompt_is_an_error_with_its_line(tmp_path):
    folder = write_turns(tmp_path, mbpp=["a", " "])
    with pytest.raises(PromptError, match=r"mbpp\.jsonl:2: empty content"):
        plan(folder, "mbpp")


def test_prompts_of_ones_own_are_all_taken_as_they_are(tmp_path):
    folder = write_turns(tmp_path, mine=["a", "b"])
    task = PromptFile(name="mine", path=folder / "mine.jsonl")
    planned = plan_task(task, task.path, encoder(), seed=SEED, max_samples=None, max_tokens=0)
    assert (planned.name, planned.domain, len(planned.samples)) == ("mine", "own", 2)


def test_chat_template_is_told_the_mode(tmp_path):
    model = tmp_path / "model"
    shutil.copytree(DEMO_TARGET, model, ignore=shutil.ignore_patterns("*.safetensors"))
    (model / "chat_template.jinja").write_text("{{ messages[0].content }} {{ enable_thinking }}")
    folder = write_turns(tmp_path, mbpp=["a"])
    lengths = []
    for thinking in (False, True):
        chat = encoder(enable_thinking=thinking, folder=model)
        planned = plan_task(TASKS["mbpp"], folder / "mbpp.jsonl", chat, seed=0, max_samples=None, max_tokens=0)
        lengths.append(planned.samples[0].prompt_ids)
    assert lengths[0] != lengths[1]


@pytest.mark.parametrize(
    ("changes", "is_protocol"),
    [
        ({}, True),
        ({"batch_size": 3}, True),
        ({"temperature": 0.0}, False),
        ({"max_new_tokens": 32}, False),
        ({"enable_thinking": True}, False),
        ({"confidence_threshold": 0.5}, False),
    ],
)
def test_published_protocol_is_recognised(changes, is_protocol):
    settings = BenchmarkSettings(target="t", drafter="d", **changes)
    assert settings.is_published_protocol is is_protocol
    assert json.loads(settings.model_dump_json())["seed"] == 980406
