"""The target's own answers to a run's prompts: token ids as JSON lines, durable before their features are.

Features can be made again, but only for the tokens they were made of. So an answer is on disk before the sample that
it belongs to becomes visible, and from then on its prompt is captured with exactly these tokens: in later epochs, after
a crash, after a resume (specs/streaming.md).

Every shard writes a file of its own (`answers_of`): half a line that a killed one leaves is never in another's way.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError

from services.append_log import open_append_log
from services.contracts import Record
from services.errors import CheckpointError
from services.reading import first_fault

TokenId = Annotated[int, Field(ge=0, lt=2**32)]
"""As the wire has it."""


class Answer(Record):
    """One line: what the target answered to a prompt."""

    prompt: int = Field(ge=0)
    """Number of the prompt in the run's plan."""
    token_ids: tuple[TokenId, ...]


def answers_of(path: Path, shard: int) -> Path:
    """The file that a shard writes, for the file of the first: answers.jsonl, answers-1.jsonl, …"""
    return path.with_name(f"{path.stem}-{shard}{path.suffix}") if shard else path


class AnswerWriter:
    """Appends answers; threads may share it."""

    def __init__(self, path: Path) -> None:
        """Open the file, or begin one; half a line that a crash left at its end is cut off."""
        self._file = open_append_log(path)
        self._lock = threading.Lock()

    def append(self, prompt: int, token_ids: tuple[int, ...]) -> None:
        """Write an answer and return once it is on the disk."""
        line = Answer(prompt=prompt, token_ids=token_ids).model_dump_json().encode() + b"\n"
        with self._lock:
            self._file.write(line)
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file. Again: nothing happens."""
        with self._lock:
            self._file.close()


class AnswerBook:
    """Reads the answers that writers, in whatever processes, have appended so far; the newest of a prompt counts."""

    def __init__(self, path: Path) -> None:
        """Attach to the first shard's file and those beside it, of this attempt and of earlier ones.

        None of them need exist yet.
        """
        self._path = path
        self._files: dict[Path, _Answers] = {}
        self._answers: dict[int, tuple[int, ...]] = {}

    def find(self, prompt: int) -> tuple[int, ...] | None:
        """The answer to a prompt, or None while the target has not given one.

        Raises:
            CheckpointError: A line is no answer.
        """
        others = self._path.parent.glob(f"{self._path.stem}-*{self._path.suffix}")
        for path in (self._path, *sorted(others)):
            self._files.setdefault(path, _Answers(path)).read_on(self._answers)
        return self._answers.get(prompt)


class _Answers:
    """One writer's file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._num_lines = 0

    def read_on(self, answers: dict[int, tuple[int, ...]]) -> None:
        """Add what has been appended since the last call, by prompt."""
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):  # its writer is not done with it, or died in it
                    return
                try:
                    answer = Answer.model_validate_json(line)
                except ValidationError as error:
                    raise CheckpointError(
                        f"{self._path}:{self._num_lines + 1}: not a line of answers: {line[:80]!r}: "
                        f"{first_fault(error)}. Take the line out: its prompt is answered again"
                    ) from error
                self._offset += len(line)
                self._num_lines += 1
                answers[answer.prompt] = answer.token_ids
