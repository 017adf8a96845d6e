"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

SUFFIX = ".new"
"""Of the file that is being written beside the one it will replace."""


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Where to write a file's new content; it takes the file's place at the end of the context.

    Whoever reads the file, also after a crash of this process, finds the old content or the new one.
    """
    new = path.with_name(f"{path.name}{SUFFIX}")
    yield new
    new.replace(path)


def replace_text(path: Path, text: str) -> None:
    """Write a text file, as `replacing` does."""
    with replacing(path) as new:
        new.write_text(text, encoding="utf-8")


def fsync(path: Path) -> None:
    """Have the disk hold a file, or a folder's entries, before anything that is written later."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
