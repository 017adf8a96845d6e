"""Where conversations come from: a JSONL file, or the functions of Python's own standard library.

A file is read once, to validate every line and to note where it begins; its texts stay on disk until they are used,
so a set of a million conversations costs a few megabytes of memory.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import os
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypedDict

from services.contracts import ALL_DOMAINS
from services.errors import PromptError
from services.prompts.stdlib import Split, library_functions

STDLIB = "stdlib"
LONGEST_DOMAIN = 40
"""Characters of a domain's name; something longer is no name."""

MAX_NAMED_LINES = 3
"""Rejected lines that an error quotes; all of them are in `Conversations.rejected`."""

SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
"""ShareGPT's `from` values that differ from the roles of chat templates; others pass unchanged."""


class Message(TypedDict):
    """One turn of a conversation."""

    role: str
    content: str


Conversation = list[Message]


class ConversationItems(Protocol):
    """Conversations by number that can say where each comes from."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Conversation: ...

    def origin(self, index: int) -> str:
        """File and line number, or another name by which a person finds the conversation."""
        ...

    def domain(self, index: int) -> str:
        """What its source says the conversation is of, for instance math or code; `ALL_DOMAINS` if nothing."""
        ...


@dataclass(frozen=True)
class Conversations:
    """What a source holds.

    Attributes:
        items: The conversations, read when indexed.
        rejected: One message for each malformed line: file, line number, reason.
        digest: Hash of the source's content: the same prompt numbers mean the same prompts only while it is the same.
    """

    items: ConversationItems
    rejected: list[str]
    digest: str


def load_conversations(source: str, *, split: Split, strict: bool) -> Conversations:
    """Find all conversations of a source.

    A JSONL line is an object with `messages` ([{role, content}]), `conversations` ([{from, value}], ShareGPT) or
    `turns` (the user's turns alone, as benchmark sets have them); a `domain` beside it names what it is of. Blank lines
    and a byte-order mark are passed over.

    Args:
        source: Path of a JSONL file, or ``stdlib``.
        split: Part of the standard library's modules; a file is taken whole, whatever the split.
        strict: Whether a malformed line is an error instead of being rejected and counted.

    Raises:
        PromptError: The file is missing or unreadable, a line is malformed and `strict` is set, or nothing is left.
    """
    if source == STDLIB:
        return _load_stdlib(split)
    return _load_jsonl(Path(source).expanduser(), strict=strict)


class _LibraryItems:
    def __init__(self, named: list[tuple[str, Conversation]]) -> None:
        self._named = named

    def __len__(self) -> int:
        return len(self._named)

    def __getitem__(self, index: int) -> Conversation:
        return self._named[index][1]

    def origin(self, index: int) -> str:
        return f"{STDLIB}:{self._named[index][0]}"

    def domain(self, index: int) -> str:
        return ALL_DOMAINS


def _load_stdlib(split: Split) -> Conversations:
    named: list[tuple[str, Conversation]] = []
    digest = hashlib.sha256()
    for function in library_functions(split=split):
        conversation: Conversation = [
            {"role": turn["role"], "content": turn["content"]} for turn in function.conversation()
        ]
        named.append((function.name, conversation))
        digest.update(json.dumps([function.name, conversation]).encode())
    if not named:
        raise PromptError("this Python has no sources of its standard library: give prompts.source a JSONL file")
    return Conversations(_LibraryItems(named), [], digest.hexdigest()[:32])


class _JsonlItems:
    """Conversations of a file by the offsets of their lines."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self._path = path
        self._descriptor = descriptor
        self._offsets = array("Q")
        self._lengths = array("Q")
        self._line_numbers = array("Q")

    def note(self, offset: int, length: int, line_number: int) -> None:
        self._offsets.append(offset)
        self._lengths.append(length)
        self._line_numbers.append(line_number)

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, index: int) -> Conversation:
        try:
            return parse_line(self._line(index))
        except _MalformedLine as error:
            raise PromptError(
                f"{self.origin(index)}: {error}; the line was well-formed when the run began, so the file was changed: "
                "leave prompt files alone while a run reads them"
            ) from error

    def origin(self, index: int) -> str:
        return f"{self._path}:{self._line_numbers[index]}"

    def domain(self, index: int) -> str:
        named = json.loads(self._line(index).decode("utf-8")).get("domain")
        is_name = isinstance(named, str) and 0 < len(named) <= LONGEST_DOMAIN and named.isprintable()
        return named if is_name else ALL_DOMAINS

    def _line(self, index: int) -> bytes:
        return os.pread(self._descriptor, self._lengths[index], self._offsets[index])

    def __del__(self) -> None:
        os.close(self._descriptor)


def _load_jsonl(path: Path, *, strict: bool) -> Conversations:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise PromptError(
            f"cannot read prompts file {path}: {error.strerror}. Give a JSONL file of conversations, or '{STDLIB}'."
        ) from error
    items = _JsonlItems(path, descriptor)  # from here on it owns the descriptor
    if path.is_dir():
        raise PromptError(f"prompts file {path} is a folder: give a JSONL file of conversations, or '{STDLIB}'")
    rejected: list[str] = []
    digest = hashlib.sha256()
    offset = 0
    with open(descriptor, "rb", closefd=False) as file:
        for line_number, line in enumerate(file, start=1):
            digest.update(line)
            start, length = offset, len(line)
            offset += length
            if line_number == 1:
                if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                    raise PromptError(f"prompts file {path} is UTF-16: save it as UTF-8")
                if line.startswith(codecs.BOM_UTF8):
                    skipped = len(codecs.BOM_UTF8)
                    start, length, line = start + skipped, length - skipped, line[skipped:]
            if not line.strip():
                continue
            try:
                parse_line(line)
            except _MalformedLine as error:
                message = f"{path}:{line_number}: {error}"
                if strict:
                    raise PromptError(f"{message} (prompts.strict is set: mend the line, or unset it)") from error
                rejected.append(message)
                continue
            items.note(start, length, line_number)
    if not len(items):
        named = "; ".join(rejected[:MAX_NAMED_LINES])
        raise PromptError(
            f"prompts file {path} holds no conversation"
            + (f": {len(rejected)} malformed lines, such as {named}" if rejected else ": it is empty")
        )
    return Conversations(items, rejected, digest.hexdigest()[:32])


class _MalformedLine(Exception):
    """A line is no conversation; the message says why."""


def parse_line(line: bytes) -> Conversation:
    """Read one JSONL line as a conversation.

    Raises:
        _MalformedLine: The line is not UTF-8, not JSON, or not one of the known shapes.
    """
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _MalformedLine(f"not UTF-8: {error.reason} at byte {error.start} of the line") from error
    except json.JSONDecodeError as error:
        raise _MalformedLine(f"not JSON: {error.msg} at column {error.colno}") from error
    except RecursionError as error:
        raise _MalformedLine("not a conversation: JSON nested too deeply") from error
    if not isinstance(record, dict):
        raise _MalformedLine(f"not a conversation: a JSON {type(record).__name__}, not an object")
    if "messages" in record:
        conversation = _read_turns(record, "messages", "role", "content")
    elif "conversations" in record:
        conversation = _read_turns(record, "conversations", "from", "value")
        for message in conversation:
            message["role"] = SHAREGPT_ROLES.get(message["role"], message["role"])
    elif "turns" in record:
        texts = _read_list(record, "turns")
        conversation = [{"role": "user", "content": _text(text, f"turns[{i}]")} for i, text in enumerate(texts)]
    else:
        raise _MalformedLine(
            "not a conversation: it has none of 'messages', 'conversations', 'turns' "
            f"(its keys: {', '.join(sorted(record)[:8]) or 'none'})"
        )
    return conversation


def _read_turns(record: dict[str, Any], field: str, role_key: str, content_key: str) -> Conversation:
    conversation: Conversation = []
    for number, turn in enumerate(_read_list(record, field)):
        if not isinstance(turn, dict):
            raise _MalformedLine(f"{field}[{number}] is a JSON {type(turn).__name__}, not an object")
        for key in (role_key, content_key):
            if key not in turn:
                raise _MalformedLine(f"{field}[{number}] has no {key!r}")
        role = _text(turn[role_key], f"{field}[{number}].{role_key}")
        conversation.append({"role": role, "content": _text(turn[content_key], f"{field}[{number}].{content_key}")})
    return conversation


def _read_list(record: dict[str, Any], field: str) -> list[Any]:
    turns = record[field]
    if not isinstance(turns, list) or not turns:
        raise _MalformedLine(f"{field!r} must be a list with at least one turn")
    return turns


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise _MalformedLine(f"{where} is a JSON {type(value).__name__}, not a string")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise _MalformedLine(f"{where} holds half a surrogate pair at character {error.start}") from error
    return value
