"""Conversations to token ids and loss masks, by the target's own chat template and tokenizer.

The loss mask comes from the template itself, so no list of role markers is kept anywhere. For assistant message i:

- its span **begins** where `render(messages[:i], add_generation_prompt=True)` ends: what a server gives the model is
  context, what the model then writes is loss. An empty think block that the template adds to the generation prompt
  (Qwen3 with `enable_thinking=False`) is therefore context.
- its span **ends** where `render(messages[:i + 1])` ends: content, end-of-turn token and the newline after it.

Templates may render a turn differently once others follow it: Qwen3 drops the think block of earlier turns. Where the
rendered conversation does not continue one of the two texts above, the turn's content is located by rendering the
conversation once more with a placeholder in its place; the text before the content must then be the beginning of the
generation prompt, and the text after it what ends the turn when it is the last. Otherwise the conversation is refused.
"""

from __future__ import annotations

import datetime
import json
from bisect import bisect_left
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from services.errors import PromptError
from services.prompts.sources import Conversation, Message

KNOWN_ROLES = frozenset({"system", "user", "assistant", "tool"})
PLACEHOLDER = "\ue000slipstream\ue001"
"""Stands for a turn's content; private-use characters, which text does not have and templates do not trim."""

GEMMA4_EMPTY_THOUGHT = "<|channel>thought\n<channel|>"
"""Gemma-4 without thinking writes this before each answer; it is context, not loss (specs/drafters.md)."""

SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")


class UnusablePromptError(PromptError):
    """A conversation cannot be trained on; it is skipped and counted.

    Attributes:
        reason: Short and the same for all conversations with this fault, so that they can be counted.
        detail: What is wrong with this one.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


class Encoded(NamedTuple):
    """A conversation as the target reads it: token ids, and 1 where a token counts in the loss."""

    input_ids: tuple[int, ...]
    loss_mask: tuple[int, ...]

    @property
    def num_loss_tokens(self) -> int:
        """Tokens that count in the loss."""
        return sum(self.loss_mask)


class ChatEncoder:
    """The chat template and tokenizer of one target."""

    def __init__(self, folder: Path, *, system_prompt: str | None, enable_thinking: bool) -> None:
        """Read a model folder's tokenizer files.

        Args:
            folder: Hugging Face folder with ``tokenizer.json`` and a chat template.
            system_prompt: Added by `encode` to conversations that have no system message; None adds none.
            enable_thinking: Passed to the template.

        Raises:
            PromptError: A file is missing or broken, or the model has no chat template.
        """
        self._system_prompt = system_prompt
        self._enable_thinking = enable_thinking
        self._thought = "" if enable_thinking else _empty_thought(folder)
        config = _read_json(folder / "tokenizer_config.json")
        self._special_tokens = {name: _token_text(config[name]) for name in SPECIAL_TOKENS if config.get(name)}
        self._template = _compile(_find_template(folder, config), folder)
        path = folder / "tokenizer.json"
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the tokenizers library raises nothing narrower
            raise PromptError(f"cannot read tokenizer {path}: {error}") from error
        # Post-processors add special tokens, which the template has already written, and may trim white space from
        # offsets, after which a newline token would no longer begin where it does.
        self._tokenizer.post_processor = None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def encode(self, messages: Conversation) -> Encoded:
        """Tokenise a training conversation and mark the tokens that the target's answers consist of.

        Raises:
            UnusablePromptError: A role is unknown, a turn is empty, there is no assistant turn, or the template
                refuses the conversation or renders it inconsistently.
        """
        _check(messages)
        messages = self._with_system_prompt(messages)
        assistants = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if not assistants:
            raise UnusablePromptError("no assistant turn", "there is nothing to learn from")
        messages = [self._with_thought(message) for message in messages]
        text = self.render(messages)
        spans = [self._span(messages, i, text) for i in assistants]
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        return Encoded(tuple(encoding.ids), mask_of_spans([start for start, _ in encoding.offsets], spans))

    def _with_thought(self, message: Message) -> Message:
        if message["role"] != "assistant" or message["content"].startswith(self._thought):
            return message
        return {"role": "assistant", "content": self._thought + message["content"]}

    def _with_system_prompt(self, messages: Conversation) -> Conversation:
        if self._system_prompt is None or messages[0]["role"] == "system":
            return messages
        return [{"role": "system", "content": self._system_prompt}, *messages]

    def encode_prompt(self, messages: Conversation) -> list[int]:
        """Tokenise what a server would give the model to answer: the messages and the generation prompt, no more.

        Raises:
            UnusablePromptError: A role is unknown, a turn is empty, or the template refuses the conversation.
        """
        _check(messages)
        text = self.render(messages, add_generation_prompt=True)
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def encode_question(self, messages: Conversation) -> list[int]:
        """Tokenise the part of a training conversation that the target shall answer in its own way.

        That is all up to the first user turn that has no answer, or, if every one has, up to the last that has one.

        Raises:
            UnusablePromptError: As `encode_prompt`, or there is no user turn.
        """
        return self.encode_prompt(self._with_system_prompt(_question(messages)))

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        """The template's text for a conversation.

        Raises:
            UnusablePromptError: The template refuses the conversation.
        """
        try:
            return self._template.render(
                **self._special_tokens,
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                enable_thinking=self._enable_thinking,
            )
        except jinja2.TemplateError as error:
            roles = ", ".join(message["role"] for message in messages)
            raise UnusablePromptError(
                "refused by the chat template", f"{error} (roles: {roles or 'none'}; see prompts.system_prompt)"
            ) from error

    def _span(self, messages: Conversation, i: int, text: str) -> tuple[int, int]:
        """Characters [start, end) of assistant message i in the rendered conversation, end of turn included."""
        prompt = self.render(messages[:i], add_generation_prompt=True)
        until = self.render(messages[: i + 1])
        start = len(prompt) if text.startswith(prompt) else self._start_in_context(messages, i, text, prompt)
        end = len(until) if text.startswith(until) else self._end_in_context(messages, i, text)
        if self._thought and text.startswith(self._thought, start):
            start += len(self._thought)
        if end <= start:
            raise _inconsistent(i, "its end comes before its beginning")
        return start, end

    def _start_in_context(self, messages: Conversation, i: int, text: str, prompt: str) -> int:
        before, _ = self._around(messages, i)
        if not (text.startswith(before) and prompt.startswith(before)):
            raise _inconsistent(
                i,
                "what comes before its content is not the beginning of the generation prompt "
                f"(prompts.enable_thinking is {str(self._enable_thinking).lower()}: does the conversation fit it?)",
            )
        return len(before)

    def _end_in_context(self, messages: Conversation, i: int, text: str) -> int:
        _, after = self._around(messages, i)
        _, end_of_turn = self._around(messages[: i + 1], i)
        if not (text.endswith(after) and after.startswith(end_of_turn)):
            raise _inconsistent(i, "it ends differently when other turns follow")
        return len(text) - len(after) + len(end_of_turn)

    def _around(self, messages: Conversation, i: int) -> tuple[str, str]:
        """The rendered text before and after the content of message i."""
        changed: Conversation = [*messages]
        changed[i] = {"role": messages[i]["role"], "content": PLACEHOLDER}
        parts = self.render(changed).split(PLACEHOLDER)
        if len(parts) != 2:
            raise _inconsistent(i, f"its content appears {len(parts) - 1} times")
        return parts[0], parts[1]


def _question(messages: Conversation) -> Conversation:
    users = [i for i, message in enumerate(messages) if message["role"] == "user"]
    if not users:
        raise UnusablePromptError("no user turn", "there is nothing for the target to answer")
    unanswered = [i for i in users if i + 1 == len(messages) or messages[i + 1]["role"] == "user"]
    return messages[: (unanswered or users[-1:])[0] + 1]


def mask_of_spans(token_starts: Sequence[int], spans: Sequence[tuple[int, int]]) -> tuple[int, ...]:
    """1 for each token that begins within one of the spans.

    Args:
        token_starts: First character of each token, ascending.
        spans: Character ranges [start, end).
    """
    mask = [0] * len(token_starts)
    for start, end in spans:
        for token in range(bisect_left(token_starts, start), bisect_left(token_starts, end)):
            mask[token] = 1
    return tuple(mask)


def _check(messages: Conversation) -> None:
    for number, message in enumerate(messages):
        if message["role"] not in KNOWN_ROLES:
            raise UnusablePromptError(
                "unknown role", f"turn {number} is by {message['role']!r}, not {', '.join(sorted(KNOWN_ROLES))}"
            )
        if not message["content"].strip():
            raise UnusablePromptError("empty content", f"turn {number} ({message['role']}) is empty")


def _inconsistent(i: int, what: str) -> UnusablePromptError:
    return UnusablePromptError(
        "inconsistent rendering",
        f"the chat template does not render turn {i} as a continuation of its generation prompt: {what}",
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PromptError(f"cannot read {path}: {error}") from error
    if not isinstance(value, dict):
        raise PromptError(f"{path} is not a JSON object")
    return value


def _empty_thought(folder: Path) -> str:
    path = folder / "config.json"
    model_type = str(_read_json(path).get("model_type", "")) if path.exists() else ""
    return GEMMA4_EMPTY_THOUGHT if model_type.startswith("gemma4") else ""


def _token_text(token: str | dict[str, Any]) -> str:
    return token if isinstance(token, str) else str(token["content"])


def _find_template(folder: Path, config: dict[str, Any]) -> str:
    """The folder's template file, else the tokenizer config's entry; of several named ones the default."""
    path = folder / "chat_template.jinja"
    if path.exists():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    if not isinstance(template, str):
        raise PromptError(
            f"model folder {folder} has no chat template: targets must be chat models "
            "(chat_template.jinja, or chat_template in tokenizer_config.json)"
        )
    return template


def _compile(source: str, folder: Path) -> jinja2.Template:
    """Compile a template in the environment that model authors write for (transformers' own)."""

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationBlock]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        raise PromptError(f"the chat template of {folder} does not compile: {error}") from error


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}`, which some templates put around answers: here only its content."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
