"""How often a coordinator of a run began: the number above which the attempts of each life are counted."""

from __future__ import annotations

from pathlib import Path

from services.errors import CheckpointError
from services.files import fsync, replacing

ATTEMPTS_A_LIFE = 1000
"""Attempts of life n are n · 1000 and up: a capture is given up long before the next life's numbers."""

LONGEST_NUMBER = 12
"""Digits; nobody starts a coordinator so often, and its attempts are still numbers of 64 bits."""


def count_life(path: Path) -> int:
    """Begin a life; returns its number, from 0, which no crash can give out twice.

    Raises:
        CheckpointError: The file holds no number.
    """
    try:
        text = path.read_text(encoding="utf-8") if path.exists() else "0"
    except UnicodeDecodeError:
        text = ""
    number = text.strip()
    if not (number.isascii() and number.isdecimal() and len(number) <= LONGEST_NUMBER):
        raise CheckpointError(
            f"{path}: {text[:80]!r} is no number below 10^{LONGEST_NUMBER}: it counts the lives of this run's "
            "coordinator. Write one into it that is above them, such as 1000"
        )
    life = int(number)
    with replacing(path) as new:
        new.write_text(f"{life + 1}\n", encoding="utf-8")
        fsync(new)
    return life
