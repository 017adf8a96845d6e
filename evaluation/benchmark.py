"""What an evaluation decodes: its settings, and the samples of each task in the published protocol. No torch."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field

from evaluation.records import SampleKey, hash_of
from evaluation.task_sources import load_turns
from evaluation.tasks import MAX_NEW_TOKENS, SEED, TEMPERATURE, Domain, Task
from services.contracts import Record
from services.errors import PromptError
from services.prompts.chat import ChatEncoder, UnusablePromptError
from services.prompts.sources import Message


class BenchmarkSettings(Record):
    """How samples are decoded.

    Attributes:
        target: Folder or hub name.
        drafter: Native checkpoint folder.
        temperature: 0 is greedy.
        max_new_tokens: Most tokens that a sample grows by.
        confidence_threshold: Cuts a proposal before the first token the drafter is less sure of; 0 never cuts.
        confidence_temperatures: What confidence logits are divided by before that, one a drafted token; None: nothing.
        seed: Sample i of a task is decoded with seed + i.
        batch_size: Samples decoded at once.
        enable_thinking: Chat-template mode.
        dtype: Of target and drafter.
        device: What they run on.
        threads: torch threads; None leaves them.
        measure_speedup: Whether each sample is also decoded by the target alone.
        allow_other_target: Whether a drafter may have been trained with a target of another fingerprint.
    """

    target: str
    drafter: str
    temperature: float = Field(TEMPERATURE, ge=0)
    max_new_tokens: int = Field(MAX_NEW_TOKENS, ge=1)
    confidence_threshold: float = Field(0.0, ge=0, le=1)
    confidence_temperatures: tuple[float, ...] | None = None
    seed: int = SEED
    batch_size: int = Field(16, ge=1)
    enable_thinking: bool = False
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: Literal["cpu", "cuda"] = "cpu"
    threads: int | None = Field(None, ge=1)
    measure_speedup: bool = True
    allow_other_target: bool = False

    @property
    def is_published_protocol(self) -> bool:
        """Whether figures can be set beside the published ones, the number of samples aside."""
        return (
            self.temperature == TEMPERATURE
            and self.max_new_tokens == MAX_NEW_TOKENS
            and not self.enable_thinking
            and self.confidence_threshold == 0
        )


class Sample(Record):
    """One prompt to decode."""

    task: str
    domain: Domain
    index: int
    seed: int
    prompt_ids: tuple[int, ...]

    @property
    def key(self) -> SampleKey:
        """Which sample this is."""
        return self.task, self.index

    @property
    def prompt_hash(self) -> str:
        """Names the prompt's tokens."""
        return hash_of(self.prompt_ids)


class PlannedTask(Record):
    """The samples of one task.

    Attributes:
        name: Of the task.
        domain: Of the task.
        samples: In the order of their indices.
        num_skipped: Prompts that are longer than the target's context.
    """

    name: str
    domain: Domain
    samples: tuple[Sample, ...]
    num_skipped: int = 0


class PromptFile(Record):
    """Prompts of the user's own.

    Attributes:
        name: What the task is called.
        path: JSONL file of conversations.
    """

    name: str
    path: Path


def plan_task(
    task: Task | PromptFile, path: Path, encoder: ChatEncoder, *, seed: int, max_samples: int | None, max_tokens: int
) -> PlannedTask:
    """Choose and encode the prompts of a task: first turns only, shuffled with the seed if some are left out.

    Args:
        task: Which; its counts, domain and suffix.
        path: Its prompts.
        encoder: The target's chat template; gives no system prompt.
        seed: Of the shuffle; sample i gets seed + i.
        max_samples: Fewer samples than the task's own count.
        max_tokens: The target's context; longer prompts are left out and counted. 0: it has no bound.

    Raises:
        PromptError: The file holds no prompt, or a malformed one, or none fits the context.
    """
    conversations, turns = load_turns(path)
    order = choose(len(turns), _count(task, max_samples), seed)
    domain: Domain = task.domain if isinstance(task, Task) else "own"
    samples, num_skipped, longest = [], 0, 0
    for index, line in enumerate(order):
        message = turns[line]
        if isinstance(task, Task):
            message = Message(role="user", content=task.with_suffix(message["content"]))
        try:
            prompt_ids = encoder.encode_prompt([message])
        except UnusablePromptError as error:
            raise PromptError(f"{conversations.items.origin(line)}: {error}. Mend the line or take it out") from error
        longest = max(longest, len(prompt_ids))
        if max_tokens and len(prompt_ids) > max_tokens:
            num_skipped += 1
        else:
            sample = Sample(task=task.name, domain=domain, index=index, seed=seed + index, prompt_ids=tuple(prompt_ids))
            samples.append(sample)
    if not samples:
        raise PromptError(
            f"all {num_skipped} prompts of {task.name} are longer than the target's context of {max_tokens} tokens "
            f"(the longest has {longest}): leave the task out, or give shorter prompts"
        )
    return PlannedTask(name=task.name, domain=domain, samples=tuple(samples), num_skipped=num_skipped)


def choose(num_rows: int, count: int | None, seed: int) -> Sequence[int]:
    """Which rows are decoded, in their order: all as they are, or the first of them after a shuffle."""
    order = list(range(num_rows))
    if count is None or num_rows <= count:
        return order
    random.Random(seed).shuffle(order)
    return order[:count]


def _count(task: Task | PromptFile, max_samples: int | None) -> int | None:
    counts = [count for count in (task.count if isinstance(task, Task) else None, max_samples) if count is not None]
    return min(counts, default=None)
