"""From a conversation to a capture job, or to the reason why there is none."""

from __future__ import annotations

import random
from typing import NamedTuple

from services.answers import AnswerBook
from services.contracts import CaptureJob, Generation, HeldoutPrompt, LastRows
from services.errors import PromptError
from services.prompts.chat import ChatEncoder, Encoded, UnusablePromptError
from services.prompts.config import PromptsConfig
from services.prompts.plan import answer_seed
from services.prompts.sources import Conversations

TOO_LONG = "too long"
TOO_FEW_LOSS_TOKENS = "too few loss tokens"


class OwnAnswers(NamedTuple):
    """What it takes to train on the target's own answers."""

    book: AnswerBook
    """Those that are known."""
    stop_token_ids: tuple[int, ...]


class Intake:
    """Encodes conversations when they are due; remembers those that are of no use."""

    def __init__(
        self,
        conversations: Conversations,
        encoder: ChatEncoder,
        config: PromptsConfig,
        last_rows: LastRows,
        own_answers: OwnAnswers | None = None,
    ) -> None:
        """Encode `conversations`; with `own_answers` the target's answers take the place of theirs."""
        self._conversations = conversations
        self._encoder = encoder
        self._config = config
        self._last_rows = last_rows
        self._own_answers = own_answers
        self._unusable: dict[int, UnusablePromptError] = {}

    def job(
        self, *, capture: int, attempt: int, prompt: int, epoch: int, reuse: int, ks: tuple[int, ...] | None
    ) -> CaptureJob:
        """Encode a prompt as a capture job.

        Raises:
            UnusablePromptError: It cannot be trained on; the detail names its file and line.
            PromptError: The prompts file was changed since the run began.
        """
        if prompt in self._unusable:
            raise self._unusable[prompt]
        try:
            encoded, generate = self._encode(prompt)
            last_rows = () if generate else self._last_rows.select(encoded.loss_mask)
            if generate is None:
                check_lengths(encoded, num_last_rows=len(last_rows), config=self._config)
        except UnusablePromptError as error:
            located = UnusablePromptError(error.reason, f"{self._conversations.items.origin(prompt)}: {error.detail}")
            self._unusable[prompt] = located
            raise located from error
        return CaptureJob(
            capture=capture,
            attempt=attempt,
            prompt=prompt,
            epoch=epoch,
            reuse=reuse,
            input_ids=encoded.input_ids,
            loss_mask=encoded.loss_mask,
            last_rows=tuple(last_rows),
            ks=ks,
            generate=generate,
        )

    def _encode(self, prompt: int) -> tuple[Encoded, Generation | None]:
        """The tokens as far as they are known, and how the target shall go on from there if it shall."""
        conversation = self._conversations.items[prompt]
        if self._own_answers is None:
            return self._encoder.encode(conversation), None
        question = self._encoder.encode_question(conversation)
        answer = self._own_answers.book.find(prompt)
        if answer is not None:
            return Encoded((*question, *answer), (0,) * len(question) + (1,) * len(answer)), None
        room = self._config.max_length - len(question)
        if room < self._config.min_loss_tokens:
            raise UnusablePromptError(
                TOO_LONG,
                f"{len(question)} tokens leave {room} of prompts.max_length {self._config.max_length} for an answer, "
                f"below prompts.min_loss_tokens {self._config.min_loss_tokens}",
            )
        generate = Generation(
            max_new_tokens=min(self._config.max_new_tokens, room),
            min_new_tokens=self._config.min_loss_tokens,
            temperature=self._config.temperature,
            seed=answer_seed(self._config.seed, prompt),
            stop_token_ids=self._own_answers.stop_token_ids,
            last_rows=self._last_rows,
        )
        return Encoded(tuple(question), (0,) * len(question)), generate


def check_lengths(encoded: Encoded, *, num_last_rows: int, config: PromptsConfig) -> None:
    """Check that a conversation is neither too long nor has too little to learn from.

    Raises:
        UnusablePromptError: It is, or has.
    """
    num_tokens, num_loss_tokens = len(encoded.input_ids), encoded.num_loss_tokens
    if num_tokens > config.max_length:
        raise UnusablePromptError(TOO_LONG, f"{num_tokens} tokens, above prompts.max_length {config.max_length}")
    if num_loss_tokens < config.min_loss_tokens:
        raise UnusablePromptError(
            TOO_FEW_LOSS_TOKENS,
            f"{num_loss_tokens} loss tokens, below prompts.min_loss_tokens {config.min_loss_tokens}",
        )
    if num_last_rows == 0:
        raise UnusablePromptError(TOO_FEW_LOSS_TOKENS, f"no two of its {num_loss_tokens} loss tokens are neighbours")


def first_turns(
    conversations: Conversations, encoder: ChatEncoder, *, count: int, seed: int, max_length: int
) -> list[HeldoutPrompt]:
    """The first user turn of conversations, each with the generation prompt, for evaluation.

    Args:
        conversations: Where from.
        encoder: The target's.
        count: How many prompts at most.
        seed: Of the order.
        max_length: Longer prompts are left out.

    Raises:
        PromptError: No conversation has a user turn of this length.
    """
    order = list(range(len(conversations.items)))
    random.Random(seed).shuffle(order)
    prompts: list[HeldoutPrompt] = []
    for index in order:
        if len(prompts) == count:
            break
        user = next((message for message in conversations.items[index] if message["role"] == "user"), None)
        if user is None or not user["content"].strip():
            continue
        ids = encoder.encode_prompt([user])
        if len(ids) <= max_length:
            prompts.append(HeldoutPrompt(token_ids=ids, domain=conversations.items.domain(index)))
    if count and not prompts:
        raise PromptError(
            f"none of the {len(order)} held-out conversations begins with a user turn of at most {max_length} tokens"
        )
    return prompts
