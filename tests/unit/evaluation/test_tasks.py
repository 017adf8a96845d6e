from __future__ import annotations

import pytest

from evaluation.published import COLUMNS, published_row, published_target
from evaluation.tasks import MATH_SUFFIX, PUBLISHED_TASKS, TASKS, find_task
from services.errors import UsageError


def test_nine_tasks_are_published_with_their_counts():
    assert {name: TASKS[name].count for name in PUBLISHED_TASKS} == {
        "gsm8k": 500, "math500": 500, "aime25": 30, "humaneval": 164, "mbpp": 256, "livecodebench": 500,
        "mt-bench": 80, "alpaca": 500, "arena-hard-v2": 500,
    }  # fmt: skip
    assert set(PUBLISHED_TASKS) == set(COLUMNS)


def test_unknown_task_lists_the_known():
    with pytest.raises(UsageError, match=r"no task 'gsm9k'.*gsm8k, math500.*arena-hard-v2.*--prompts"):
        find_task("gsm9k")


@pytest.mark.parametrize(
    ("task", "row", "turns"),
    [
        ("gsm8k", {"question": "1+1?", "answer": "2"}, ["1+1?"]),
        ("math500", {"problem": "x"}, ["x"]),
        ("aime25", {"problem": "x", "answer": 3}, ["x"]),
        ("mbpp", {"prompt": "Write f.", "code": ""}, ["Write f."]),
        ("mt-bench", {"prompt": ["a", "b"]}, ["a", "b"]),
        ("alpaca", {"instruction": "Do.", "input": ""}, ["Do."]),
        ("alpaca", {"instruction": "Do.", "input": "this"}, ["Do.\n\nInput:\nthis"]),
        ("arena-hard-v2", {"prompt": "hard", "uid": 1}, ["hard"]),
        (
            "humaneval",
            {"prompt": "def f():\n"},
            [
                "Write a solution to the following problem and make sure that it passes the tests:\n"
                "```python\ndef f():\n\n```"
            ],
        ),
    ],
)
def test_rows_become_turns(task, row, turns):
    assert list(TASKS[task].read(row)) == turns


def test_livecodebench_asks_for_the_starter_code_where_there_is_one():
    without, with_code = (
        TASKS["livecodebench"].read({"question_content": "Q?", "starter_code": code})[0] for code in ("", "class S:")
    )
    assert without.startswith("You are an expert Python programmer.")
    assert without.endswith(
        "for the program\n\n### Question:\nQ?\n\n### Format: Write your code in the following format:\n```python\n"
        "# YOUR CODE HERE\n```\n\n### Answer: (use the provided format with backticks)"
    )
    assert "### Format: Use the following code structure:\n```python\nclass S:\n```" in with_code


@pytest.mark.parametrize("name", TASKS)
def test_math_prompts_end_with_the_instruction_once(name):
    task = TASKS[name]
    expected = f"x{MATH_SUFFIX}" if task.domain == "math" else "x"
    assert task.with_suffix("x") == expected
    assert task.with_suffix(expected) == expected


@pytest.mark.parametrize(
    ("target", "known"),
    [
        ("Qwen/Qwen3-4B", "Qwen3-4B"),
        ("/models/qwen3-14b/", "Qwen3-14B"),
        ("/cache/models--Qwen--Qwen3-8B/snapshots/0a1b", "Qwen3-8B"),
        ("google/gemma-4-12b-it", "Gemma-4-12B"),
        ("Qwen/Qwen3-4B-Instruct-2507", None),
        ("me/my-finetune", None),
        ("/home/me/qwen3-8b/my-finetune", None),
        ("/cache/models--me--my-finetune/snapshots/0a1b", None),
    ],
)
def test_published_targets_are_known_by_name_and_finetunes_are_not(target, known):
    assert published_target(target) == known


def test_published_row_is_that_of_target_and_kind():
    assert published_row("Qwen/Qwen3-4B", "dspark")["gsm8k"] == 6.11
    assert published_row("Qwen/Qwen3-8B", "eagle3")["arena-hard-v2"] == 2.54
    assert published_row("google/gemma-4-12b-it", "dflash")["mbpp"] == 4.39
    assert published_row("me/model", "dspark") == {}
