"""How often each token occurs in the answers that a run trains on: what a draft vocabulary is cut by."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from services.answers import AnswerBook
from services.contracts import LastRows
from services.errors import PromptError
from services.prompts.chat import ChatEncoder, Encoded, UnusablePromptError
from services.prompts.config import PromptsConfig
from services.prompts.intake import check_lengths
from services.prompts.sources import load_conversations

MOST_CONVERSATIONS = 20_000
"""Conversations that are counted at most. The 32,000th of the most frequent tokens is then seen dozens of times, and
counting takes seconds instead of the hour that a million conversations would."""


class TokenCounts(NamedTuple):
    """What was counted."""

    counts: dict[int, int]
    num_conversations: int


def count_answer_tokens(
    prompts: PromptsConfig, model: Path, answers: Path | None = None, *, most: int = MOST_CONVERSATIONS
) -> TokenCounts:
    """Count the tokens that count in the loss: of the target's own answers where these are known, else of the data's.

    Args:
        prompts: Which conversations; those that a run would skip are left out.
        model: Folder of the target, for its tokenizer and chat template.
        answers: The target's own answers, of a run that trains on them; the file need not exist yet.
        most: Conversations that are counted; of more, as many are drawn with the prompts' seed.

    Raises:
        PromptError: The prompts or the tokenizer cannot be read, or not one answer is there to be counted.
        CheckpointError: A line of the answers is none.
    """
    conversations = load_conversations(prompts.source, split="train", strict=prompts.strict).items
    encoder = ChatEncoder(model, system_prompt=prompts.system_prompt, enable_thinking=prompts.enable_thinking)
    book = AnswerBook(answers) if answers is not None and prompts.answers == "target" else None
    numbers: list[int] = list(range(len(conversations)))
    if len(numbers) > most:
        numbers = sorted(random.Random(prompts.seed).sample(numbers, most))
    counts: Counter[int] = Counter()
    num_counted = 0
    for number in numbers:
        own = book.find(number) if book else None
        if own is None:
            try:
                own = _answer_tokens(encoder.encode(conversations[number]), prompts)
            except UnusablePromptError:
                continue
        counts.update(own)
        num_counted += 1
    if not counts:
        raise PromptError(
            f"none of {len(numbers)} conversations of {prompts.source} has an answer whose tokens could be counted for "
            "drafter.draft_vocab_size: give conversations with answers, or leave it out and cut the vocabulary "
            "afterwards, by what the target answered: slipstream export --draft-vocab-size"
        )
    return TokenCounts(dict(counts), num_counted)


def _answer_tokens(encoded: Encoded, prompts: PromptsConfig) -> tuple[int, ...]:
    check_lengths(encoded, num_last_rows=len(LastRows.AFTER.select(encoded.loss_mask)), config=prompts)
    return tuple(token for token, counts in zip(encoded.input_ids, encoded.loss_mask, strict=True) if counts)
