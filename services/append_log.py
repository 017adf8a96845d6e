"""Files that only grow, a line at a time, and survive a writer that is killed in the middle of one."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import BinaryIO


def open_append_log(path: Path, *, alone: bool = False) -> BinaryIO:
    """Open a file of lines for appending and reading, or begin one; half a line at its end is cut off.

    The missing end of that line was never told to anybody: what wrote it died before it could.

    Args:
        path: Of the file; its folder is made if need be.
        alone: Whether the file is locked for as long as it is open, so that the line of a writer at work is not cut.

    Raises:
        BlockingIOError: Another process has locked it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a+b")
    try:
        if alone:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _cut_torn_line(file)
    except BaseException:
        file.close()
        raise
    return file


def _cut_torn_line(file: BinaryIO) -> None:
    end = file.seek(0, os.SEEK_END)
    keep = end
    while keep:
        file.seek(keep - 1)
        if file.read(1) == b"\n":
            break
        keep -= 1
    if keep < end:
        file.truncate(keep)
