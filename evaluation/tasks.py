"""The benchmarks that drafters are compared on: where each one's prompts come from and how many of them count.

What is measured and how stands in docs/evaluation.md. No torch, and nothing is downloaded here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from services.errors import UsageError

Domain = Literal["math", "code", "chat", "own"]
DOMAINS: tuple[Domain, ...] = ("math", "code", "chat", "own")

Row = Mapping[str, Any]
"""One row of a data set, by field."""

SEED = 980406
"""Shuffles a task that is cut; sample i, counted after the shuffle, is decoded with SEED + i."""

TEMPERATURE = 1.0
MAX_NEW_TOKENS = 2048
"""Of the published figures, as `SEED` and `TEMPERATURE`."""

MATH_SUFFIX = "\nPlease reason step by step, and put your final answer within \\boxed{}."

HUB = "https://huggingface.co/datasets"

CODING_INSTRUCTION = (
    "You are an expert Python programmer. You will be given a question (problem specification) and will generate a "
    "correct Python program that matches the specification and passes all tests. You will NOT return anything except "
    "for the program"
)


@dataclass(frozen=True)
class HubDataset:
    """A data set that `datasets.load_dataset` reads."""

    path: str
    split: str
    config: str | None = None

    def __str__(self) -> str:
        return f"{self.path} ({self.split})"


@dataclass(frozen=True)
class JsonFiles:
    """JSONL files on the web, for data sets that `datasets` cannot read without running their code."""

    urls: tuple[str, ...]

    def __str__(self) -> str:
        return self.urls[0]


@dataclass(frozen=True)
class Task:
    """One benchmark.

    Attributes:
        name: As on the command line.
        domain: What kind of text it asks for.
        count: Most prompts that are decoded.
        source: Where its rows come from.
        read: Gives the user's turns of a row.
        suffix: What every first turn ends with.
    """

    name: str
    domain: Domain
    count: int
    source: HubDataset | JsonFiles
    read: Callable[[Row], Sequence[str]]
    suffix: str = ""

    def with_suffix(self, text: str) -> str:
        """A first turn with what it must end with."""
        return text if text.endswith(self.suffix) else text + self.suffix


def _field(name: str) -> Callable[[Row], Sequence[str]]:
    return lambda row: [row[name]]


def _alpaca(row: Row) -> Sequence[str]:
    return [f"{row['instruction']}\n\nInput:\n{row['input']}" if row["input"] else row["instruction"]]


def _humaneval(row: Row) -> Sequence[str]:
    instruction = "Write a solution to the following problem and make sure that it passes the tests:"
    return [f"{instruction}\n```python\n{row['prompt']}\n```"]


def _livecodebench(row: Row) -> Sequence[str]:
    form, code = "Write your code in the following format:", "# YOUR CODE HERE"
    if row.get("starter_code"):
        form, code = "Use the following code structure:", row["starter_code"]
    return [
        f"{CODING_INSTRUCTION}\n\n### Question:\n{row['question_content']}\n\n### Format: {form}\n```python\n{code}\n"
        "```\n\n### Answer: (use the provided format with backticks)"
    ]


_LIVECODEBENCH = tuple(f"{HUB}/livecodebench/code_generation_lite/resolve/main/test{n}.jsonl" for n in ("", *"23456"))
_ARENA_HARD = f"{HUB}/lmarena-ai/arena-hard-auto/resolve/main/data/arena-hard-v2.0/question.jsonl"

_ALL = (
    Task("gsm8k", "math", 500, HubDataset("openai/gsm8k", "test", "main"), _field("question"), MATH_SUFFIX),
    Task("math500", "math", 500, HubDataset("HuggingFaceH4/MATH-500", "test"), _field("problem"), MATH_SUFFIX),
    Task("aime24", "math", 30, HubDataset("HuggingFaceH4/aime_2024", "train"), _field("problem"), MATH_SUFFIX),
    Task("aime25", "math", 30, HubDataset("MathArena/aime_2025", "train"), _field("problem"), MATH_SUFFIX),
    Task("humaneval", "code", 164, HubDataset("openai/openai_humaneval", "test"), _humaneval),
    Task("mbpp", "code", 256, HubDataset("google-research-datasets/mbpp", "test", "sanitized"), _field("prompt")),
    Task("livecodebench", "code", 500, JsonFiles(_LIVECODEBENCH), _livecodebench),
    Task("mt-bench", "chat", 80, HubDataset("HuggingFaceH4/mt_bench_prompts", "train"), lambda row: row["prompt"]),
    Task("alpaca", "chat", 500, HubDataset("tatsu-lab/alpaca", "train"), _alpaca),
    Task("arena-hard-v2", "chat", 500, JsonFiles((_ARENA_HARD,)), _field("prompt")),
)

TASKS: Mapping[str, Task] = {task.name: task for task in _ALL}

PUBLISHED_TASKS = tuple(name for name in TASKS if name != "aime24")
"""What is evaluated when nothing else is asked for."""


def find_task(name: str) -> Task:
    """The task of that name.

    Raises:
        UsageError: There is none; the message lists those there are.
    """
    if name not in TASKS:
        raise UsageError(
            f"there is no task {name!r}; there is: {', '.join(TASKS)}. Prompts of your own: --prompts FILE.jsonl"
        )
    return TASKS[name]
