"""How often a coordinator of a run began: the number above which the attempts of each life are counted."""

from __future__ import annotations

import os
from pathlib import Path

from services.errors import CheckpointError

ATTEMPTS_A_LIFE = 1000
"""Attempts of life n are n · 1000 and up: a capture is given up long before the next life's numbers."""


def count_life(path: Path) -> int:
    """Begin a life; returns its number, from 0, which no crash can give out twice.

    Raises:
        CheckpointError: The file holds no number.
    """
    try:
        life = int(path.read_text()) if path.exists() else 0
    except ValueError as error:
        raise CheckpointError(f"{path} holds no number: it counts the lives of this run's coordinator") from error
    new = path.with_name(f"{path.name}.new")
    with new.open("w") as file:
        file.write(f"{life + 1}\n")
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
    return life
