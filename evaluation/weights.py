"""What a drafter checkpoint is, whatever its folder is called. No torch."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path

FILES = ("config.json", "model.safetensors")
"""All that decoding reads of a checkpoint."""

Stamp = tuple[tuple[int, int, int, int], ...]


def weights_digest(checkpoint: Path) -> str:
    """Hash of the drafter in a folder; files that are unchanged since the last time are not read again.

    Raises:
        FileNotFoundError: The folder is not there, or no longer.
    """
    files = tuple(checkpoint / name for name in FILES)
    return _digest(files, tuple(_stamp(file) for file in files))


def _stamp(file: Path) -> tuple[int, int, int, int]:
    found = file.stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


@lru_cache(maxsize=64)
def _digest(files: tuple[Path, ...], _: Stamp) -> str:
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:32]
