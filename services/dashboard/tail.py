"""Reads a growing file of JSON lines, a bit at a time, while somebody else writes it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.reading import read_json

READ_BYTES = 4 * 1024**2
"""Most bytes of one look: a long history is taken in parts, so that a caller can do something else in between."""


@dataclass(frozen=True)
class Lines:
    """What one look has found.

    Attributes:
        records: Each with the place in the file right behind it, oldest first.
        is_new_file: The file was replaced or cut since the last look: what was read before counts for nothing.
        is_all: Nothing more was there.
    """

    records: list[tuple[int, dict[str, Any]]]
    is_new_file: bool
    is_all: bool


class JsonLinesTail:
    """One reader's place in the file.

    Attributes:
        path: The file.
        file_id: Which file it is, the same for every reader; 0 while there is none.
        num_broken: Lines that are no JSON object, left out: a killed writer can leave one half-written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offset = 0
        self._rest = b""
        self.file_id = 0
        self.num_broken = 0

    def look(self) -> Lines:
        """Read on. A last line without its end is left for the next look.

        Raises:
            OSError: The file is there and cannot be read.
        """
        try:
            with self.path.open("rb") as file:
                return self._read(file.fileno())
        except FileNotFoundError:
            was_there = self.file_id != 0
            self._begin(0)
            return Lines([], is_new_file=was_there, is_all=True)

    def _begin(self, file_id: int) -> None:
        self.file_id, self._offset, self._rest, self.num_broken = file_id, 0, b"", 0

    def _read(self, descriptor: int) -> Lines:
        state = os.fstat(descriptor)
        is_new_file = False
        if state.st_ino != self.file_id or state.st_size < self._offset:
            is_new_file = self.file_id != 0
            self._begin(state.st_ino)
        data = os.pread(descriptor, READ_BYTES, self._offset)
        end = self._offset - len(self._rest)
        self._offset += len(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        records = []
        for line in lines:
            end += len(line) + 1
            record = _parse(line)
            if record is not None:
                records.append((end, record))
            elif line.strip():
                self.num_broken += 1
        return Lines(records, is_new_file=is_new_file, is_all=self._offset >= state.st_size)


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = read_json(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None
