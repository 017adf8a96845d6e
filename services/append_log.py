"""Files that only grow, a line at a time, and survive a writer that is killed in the middle of one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO


def open_append_log(path: Path) -> BinaryIO:
    """Open a file of lines for appending and reading, or begin one; half a line at its end is cut off.

    The missing end of that line was never told to anybody: what wrote it died before it could.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a+b")
    try:
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
