"""Where checkpoints lie and how one becomes visible: written aside, fsynced, renamed, and only then pointed to.

    <output_dir>/step_<N>/    a whole checkpoint: drafter, training state, ledger, recipe, provenance
    <output_dir>/step_0/      the untrained drafter alone; nothing resumes from it
    <output_dir>/step_latest  symlink to the newest whole one, moved last and atomically
    <output_dir>/step_best    symlink to the one with the longest measured accepted length, moved atomically
    <output_dir>/step_measuring  symlink to the one that is being decoded with, if any
    <output_dir>/.step_<N>    one being written or deleted; never read

None that is pointed to is ever deleted. This module imports no torch: the driver uses it too.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from services.errors import CheckpointError
from services.files import fsync

LATEST = "step_latest"
BEST = "step_best"
MEASURING = "step_measuring"
LOCK = ".checkpoints.lock"
LEDGER = "ledger.jsonl"

_STEP_NAME = re.compile(r"step_(\d+)")
_HIDDEN_NAME = re.compile(r"\.(replaced_)?(step_\d+)")


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
    checkpoint = _pointed_to(output_dir, LATEST)
    if checkpoint is None or checkpoint.is_dir():
        return checkpoint
    with _lock(output_dir):
        replaced = _replaced_path(checkpoint)
        if replaced.is_dir() and not checkpoint.is_dir():  # killed before another one of the same step took its place
            replaced.rename(checkpoint)
        if checkpoint.is_dir():
            return checkpoint
    raise CheckpointError(
        f"{output_dir / LATEST} points to {checkpoint.name}, which is not there: point it to a step_<N> folder that "
        "is, or remove it to start the run anew"
    )


def best_checkpoint(output_dir: Path) -> Path | None:
    """The checkpoint whose drafter did best of those measured; None where none was measured yet."""
    checkpoint = _pointed_to(output_dir, BEST)
    return checkpoint if checkpoint is not None and checkpoint.is_dir() else None


def mark_best(output_dir: Path, accepted_lengths: Mapping[str, float]) -> Path | None:
    """Point `step_best` to the best of the measured checkpoints that are still there; returns it.

    The untrained drafter does not count, and of equals the later one is the best. Without any, the link stays as it is.

    Args:
        output_dir: The run's directory.
        accepted_lengths: Measured τ by name of the checkpoint's folder.
    """
    with _lock(output_dir):
        there = [path for path in _trained(output_dir) if path.name in accepted_lengths]
        if not there:
            return None
        best = max(there, key=lambda path: (accepted_lengths[path.name], checkpoint_step(path)))
        if _pointed_to(output_dir, BEST) != best:
            _point(output_dir, BEST, best)
        return best


def hold(output_dir: Path, checkpoint: Path) -> None:
    """Keep a checkpoint from being deleted while it is measured; one that was held before is let go.

    Raises:
        FileNotFoundError: It has been deleted already.
    """
    with _lock(output_dir):
        if not checkpoint.is_dir():
            raise FileNotFoundError(f"{checkpoint} is not there any more")
        _point(output_dir, MEASURING, checkpoint)


def let_go(output_dir: Path) -> None:
    """Let the checkpoint that was measured be deleted when its time has come."""
    (output_dir / MEASURING).unlink(missing_ok=True)


def start_partial(output_dir: Path, step: int) -> Path:
    """Make the hidden folder for a checkpoint. What interrupted attempts left behind is removed first."""
    partial = partial_path(output_dir, step)
    if output_dir.is_dir():
        clean(output_dir)
    partial.mkdir(parents=True)
    return partial


def clean(output_dir: Path) -> None:
    """Remove what killed attempts left: no checkpoint may be being written meanwhile."""
    for path in list(output_dir.iterdir()):
        match = _HIDDEN_NAME.fullmatch(path.name)
        if match and match[1] and not (output_dir / match[2]).exists():
            path.rename(output_dir / match[2])  # killed before the other one took its place
        elif match:
            shutil.rmtree(path)


def publish(output_dir: Path, step: int, *, latest: bool = True) -> Path:
    """Make a fully written hidden folder visible, durably and in one step.

    A folder of the same step, left by an attempt that was killed before it moved `step_latest`, is replaced. If that
    was the best one measured, `step_best` goes: it was not this one that was measured.

    Args:
        output_dir: The run's directory.
        step: Which checkpoint.
        latest: Also point `step_latest` to it.
    """
    partial, checkpoint = partial_path(output_dir, step), checkpoint_path(output_dir, step)
    for path in _tree(partial):
        fsync(path)
    if checkpoint.exists():
        with _lock(output_dir):
            if _pointed_to(output_dir, BEST) == checkpoint:
                (output_dir / BEST).unlink()
            replaced = _replaced_path(checkpoint)
            checkpoint.rename(replaced)
            partial.rename(checkpoint)
        shutil.rmtree(replaced)
    else:
        partial.rename(checkpoint)
    fsync(output_dir)
    if latest:
        _point(output_dir, LATEST, checkpoint)
    return checkpoint


def prune(output_dir: Path, keep: int) -> list[Path]:
    """Delete all but the newest `keep` checkpoints, step_0 and what the links point to; returns the deleted.

    What killed attempts left goes too: no checkpoint is being written meanwhile.
    """
    clean(output_dir)
    with _lock(output_dir):
        pointed_to = {_pointed_to(output_dir, link) for link in (LATEST, BEST, MEASURING)}
        deleted = [path for path in _trained(output_dir)[:-keep] if path not in pointed_to]
        for path in deleted:
            path.rename(path.with_name(f".{path.name}"))  # a folder half deleted must not look whole
    for path in deleted:
        shutil.rmtree(path.with_name(f".{path.name}"))
    return deleted


def _trained(output_dir: Path) -> list[Path]:
    """All whole checkpoints but step_0, oldest first."""
    folders = [path for path in output_dir.iterdir() if path.is_dir() and not path.is_symlink()]
    return sorted(
        (path for path in folders if _STEP_NAME.fullmatch(path.name) and checkpoint_step(path) > 0), key=checkpoint_step
    )


def _pointed_to(output_dir: Path, link: str) -> Path | None:
    """Where a link points to, whether that is there or not; None without the link."""
    path = output_dir / link
    return output_dir / os.readlink(path) if path.is_symlink() else None


def _point(output_dir: Path, link: str, checkpoint: Path) -> None:
    """Move a link durably; whoever follows it meanwhile finds the old checkpoint or the new one."""
    new_link = output_dir / f".{link}"
    new_link.unlink(missing_ok=True)
    new_link.symlink_to(checkpoint.name)
    new_link.replace(output_dir / link)
    fsync(output_dir)


def _replaced_path(checkpoint: Path) -> Path:
    return checkpoint.with_name(f".replaced_{checkpoint.name}")


@contextlib.contextmanager
def _lock(output_dir: Path) -> Iterator[None]:
    """The driver points to the best checkpoint while rank 0 deletes old ones: one after the other."""
    descriptor = os.open(output_dir / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _tree(folder: Path) -> Iterator[Path]:
    """All files and folders below a folder, and itself, children first."""
    for root, _, names in os.walk(folder, topdown=False):
        yield from (Path(root, name) for name in names)
        yield Path(root)
