"""The append-only log of committed captures: the one record of a run's target compute that outlives crashes."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from pydantic import ValidationError

from services.append_log import open_append_log
from services.contracts import Outcome, Traffic, WireDtype
from services.errors import CheckpointError
from services.prompts.ledger import FIRST, CaptureLine
from services.reading import first_fault
from services.replay.rules import ALREADY_RESIDENT


class CaptureLog:
    """Appends a line for each committed capture, and counts them over the run's whole life.

    Attributes:
        num_captured: Captures in the log.
        num_recaptured: Those made again.
        num_tokens: Tokens of all captures.
        num_distinct_tokens: Tokens of the distinct prompts captured.
    """

    def __init__(self, path: Path, *, num_captures: int, num_prompts: int, dtype: WireDtype = "bf16") -> None:
        """Open a log, or begin one; half a line that a crash left at its end is cut off.

        Args:
            path: Of the file.
            num_captures: Captures of the plan.
            num_prompts: Prompts of the plan.
            dtype: As which features travel now.

        Raises:
            CheckpointError: A line is malformed, or of a capture that the plan does not have.
        """
        self.num_captured = 0
        self.num_recaptured = 0
        self.num_tokens = 0
        self.num_distinct_tokens = 0
        self._dtype: WireDtype = dtype
        self._traffic: dict[WireDtype, Traffic] = {}
        self._path = path
        self._next_attempt = array("L", bytes(array("L").itemsize * num_captures))
        self._seen_prompts = bytearray(num_prompts)
        self._file = open_append_log(path)
        try:
            for number, text in enumerate(self.lines(), start=1):
                self._count(self._parse(text, number))
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def traffic(self) -> dict[WireDtype, Traffic]:
        """What all captures brought, by the dtype as which it travelled."""
        return dict(self._traffic)

    def next_attempt(self, capture: int) -> int:
        """An attempt number above all those in the log; 0 for a capture that it does not have."""
        return self._next_attempt[capture]

    def has(self, capture: int, attempt: int) -> bool:
        """Whether this attempt, or a later one, is in the log."""
        return attempt < self._next_attempt[capture]

    def append(self, capture: int, prompt: int, attempt: int, num_tokens: int, num_bytes: int, why_again: str) -> None:
        """Log a committed capture.

        Args:
            capture: Its number.
            prompt: The prompt's number.
            attempt: Which try it was.
            num_tokens: Tokens captured.
            num_bytes: Bytes of features.
            why_again: The reason to log, unless the capture is made for the first time.
        """
        line = CaptureLine(
            capture=capture,
            prompt=prompt,
            attempt=attempt,
            reason=why_again if self._next_attempt[capture] else FIRST,
            num_tokens=num_tokens,
            num_bytes=num_bytes,
            dtype=self._dtype,
        )
        self._file.write(line.model_dump_json().encode() + b"\n")
        self._count(line)

    def take(self, outcome: Outcome, prompt: int, why_again: str) -> None:
        """Log a capture that was committed, unless it is logged already or nothing was captured for it."""
        was_made_before = self.next_attempt(outcome.capture) > 0
        is_known = self.has(outcome.capture, outcome.attempt)
        if not is_known and not (outcome.reason == ALREADY_RESIDENT and was_made_before):
            self.append(outcome.capture, prompt, outcome.attempt, outcome.num_tokens, outcome.num_bytes, why_again)

    def flush(self) -> None:
        """Hand the lines to the operating system: they survive the death of this process."""
        self._file.flush()

    def sync(self) -> None:
        """Put the lines on the disk: they survive the death of the machine."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def lines(self) -> Iterator[str]:
        """The lines of the file."""
        if not self._file.closed:
            self._file.flush()
        with self._path.open(
            encoding="utf-8", errors="replace", newline="\n"
        ) as file:  # what is no UTF-8 is no line either
            for line in file:
                yield line.rstrip("\n")

    def close(self) -> None:
        """Sync and close the file."""
        if not self._file.closed:
            self.sync()
            self._file.close()

    def _parse(self, text: str, number: int) -> CaptureLine:
        try:
            line = CaptureLine.model_validate_json(text)
        except ValidationError as error:
            raise CheckpointError(
                f"{self._path}:{number}: not a line of a capture log: {text[:80]!r}: {first_fault(error)}"
            ) from error
        if line.capture >= len(self._next_attempt) or line.prompt >= len(self._seen_prompts):
            raise CheckpointError(
                f"{self._path}:{number}: capture {line.capture} of prompt {line.prompt} is outside the plan of "
                f"{len(self._next_attempt)} captures: the log belongs to another run"
            )
        return line

    def _count(self, line: CaptureLine) -> None:
        self.num_captured += 1
        self.num_recaptured += line.reason != FIRST
        self.num_tokens += line.num_tokens
        dtype = line.dtype or self._dtype
        self._traffic[dtype] = self._traffic.get(dtype, Traffic()).plus(line.num_tokens, line.num_bytes)
        if not self._seen_prompts[line.prompt]:
            self._seen_prompts[line.prompt] = 1
            self.num_distinct_tokens += line.num_tokens
        self._next_attempt[line.capture] = max(self._next_attempt[line.capture], line.attempt + 1)
