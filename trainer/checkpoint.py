"""Where checkpoints lie and how one becomes visible: written aside, fsynced, renamed, and only then pointed to.

    <output_dir>/step_<N>/    a whole checkpoint: drafter, training state, ledger, recipe, provenance
    <output_dir>/step_0/      the untrained drafter alone; nothing resumes from it
    <output_dir>/step_latest  symlink to the newest whole one, moved last and atomically
    <output_dir>/.step_<N>    one being written; never read

This module imports no torch: the driver uses it too.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from services.errors import CheckpointError

LATEST = "step_latest"
LEDGER = "ledger.jsonl"

_STEP_NAME = re.compile(r"step_(\d+)")
_HIDDEN_NAME = re.compile(r"\.(replaced_)?step_\d+")


def checkpoint_path(output_dir: Path, step: int) -> Path:
    """Folder of the checkpoint after `step` optimizer steps."""
    return output_dir / f"step_{step}"


def partial_path(output_dir: Path, step: int) -> Path:
    """Hidden folder in which that checkpoint is written before it is published."""
    return output_dir / f".step_{step}"


def checkpoint_step(checkpoint: Path) -> int:
    """Number of optimizer steps behind a checkpoint folder.

    Raises:
        CheckpointError: The folder is not named like a checkpoint.
    """
    match = _STEP_NAME.fullmatch(checkpoint.name)
    if not match:
        raise CheckpointError(f"{checkpoint} is no checkpoint folder: its name must be step_<number>")
    return int(match[1])


def latest_checkpoint(output_dir: Path) -> Path | None:
    """The checkpoint that a run in this directory resumes from; None where there is none yet.

    Raises:
        CheckpointError: `step_latest` points to a folder that is not there.
    """
    link = output_dir / LATEST
    if not link.is_symlink():
        return None
    checkpoint = output_dir / os.readlink(link)
    if not checkpoint.is_dir():
        raise CheckpointError(
            f"{link} points to {checkpoint.name}, which is not there: point it to a step_<N> folder that is, "
            "or remove it to start the run anew"
        )
    return checkpoint


def start_partial(output_dir: Path, step: int) -> Path:
    """Make the hidden folder for a checkpoint; what an interrupted attempt left of it is removed."""
    partial = partial_path(output_dir, step)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def publish(output_dir: Path, step: int, *, latest: bool = True) -> Path:
    """Make a fully written hidden folder visible, durably and in one step.

    A folder of the same step, left by an attempt that was killed before it moved `step_latest`, is replaced.

    Args:
        output_dir: The run's directory.
        step: Which checkpoint.
        latest: Also point `step_latest` to it.
    """
    partial, checkpoint = partial_path(output_dir, step), checkpoint_path(output_dir, step)
    for path in _tree(partial):
        _fsync(path)
    if checkpoint.exists():
        replaced = output_dir / f".replaced_step_{step}"
        shutil.rmtree(replaced, ignore_errors=True)
        checkpoint.rename(replaced)
        partial.rename(checkpoint)
        shutil.rmtree(replaced)
    else:
        partial.rename(checkpoint)
    _fsync(output_dir)
    if latest:
        new_link = output_dir / f".{LATEST}"
        new_link.unlink(missing_ok=True)
        new_link.symlink_to(checkpoint.name)
        new_link.replace(output_dir / LATEST)
        _fsync(output_dir)
    return checkpoint


def prune(output_dir: Path, keep: int) -> list[Path]:
    """Delete all but the newest `keep` checkpoints, step_0 and what `step_latest` points to; returns the deleted.

    Hidden folders go too: no checkpoint is being written meanwhile, so a killed attempt left them.
    """
    for path in output_dir.iterdir():
        if _HIDDEN_NAME.fullmatch(path.name) and not path.is_symlink():
            shutil.rmtree(path)
    latest = latest_checkpoint(output_dir)
    folders = [path for path in output_dir.iterdir() if path.is_dir() and not path.is_symlink()]
    trained = [path for path in folders if _STEP_NAME.fullmatch(path.name) and checkpoint_step(path) > 0]
    old = sorted(trained, key=checkpoint_step)[:-keep]
    deleted = [path for path in old if path != latest]
    for path in deleted:
        hidden = path.with_name(f".{path.name}")  # a folder half deleted must not look whole
        path.rename(hidden)
        shutil.rmtree(hidden)
    return deleted


def _tree(folder: Path) -> Iterator[Path]:
    """All files and folders below a folder, and itself, children first."""
    for root, _, names in os.walk(folder, topdown=False):
        yield from (Path(root, name) for name in names)
        yield Path(root)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
