"""A folder that appears whole, on disk, or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from services.errors import OutputDirError
from services.files import fsync


def check_new_folder(folder: Path, *, force: bool, ours: Collection[str]) -> None:
    """Check that a folder can be made, or replaced, before the work that fills it.

    Args:
        folder: That shall appear.
        force: Replace one that is there, if it holds nothing but what such a folder holds.
        ours: Names of the files that such a folder holds.

    Raises:
        OutputDirError: It is there, or no folder.
    """
    try:
        if not folder.exists():
            return
        if not folder.is_dir():
            raise OutputDirError(f"{folder} is a file: give another --output-dir")
        names = sorted(path.name for path in folder.iterdir())
    except OSError as error:
        raise OutputDirError(f"cannot read {folder}: {error.strerror}; give another --output-dir") from error
    foreign = [name for name in names if name not in ours]
    if foreign:
        raise OutputDirError(
            f"{folder} holds what no export wrote ({', '.join(foreign[:3])}), and is left as it is: give another "
            "--output-dir"
        )
    if names and not force:
        raise OutputDirError(f"{folder} is not empty: give another --output-dir, or --force to replace what is there")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Fill a hidden folder beside it; at the end it takes its place, and if anything goes wrong it is removed.

    Raises:
        OutputDirError: The place cannot be written to.
    """
    partial, replaced = (folder.with_name(f".{folder.name}.{kind}") for kind in ("partial", "replaced"))
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)  # of one that was killed
        partial.mkdir()
    except OSError as error:
        raise OutputDirError(f"cannot write to {folder.parent}: {error.strerror}; give another --output-dir") from error
    try:
        yield partial
        for path in (*partial.iterdir(), partial):
            fsync(path)
        if folder.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            folder.rename(replaced)
        partial.rename(folder)
        fsync(folder.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    except OSError as error:
        raise OutputDirError(f"cannot write {folder}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
