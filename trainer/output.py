"""The output directory of a run: who owns it, what run it holds, where its files are.

run.json            identity and id of the run, and the recipe it resolved to last
step_<N>/           checkpoints, step_latest points to the newest
captures.jsonl      every capture ever committed (the ledger's second log)
telemetry.jsonl     history of metrics and events
evaluations.jsonl   decoded τ by checkpoint
summary.json        what the last attempt ended with
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from services.errors import OutputDirError
from trainer.recipe import Recipe


class OutputDir:
    """A claimed output directory; make one with `claim_output_dir`."""

    def __init__(self, path: Path, run_id: str, attempt: int) -> None:
        self.path = path
        self.run_id = run_id
        self.attempt = attempt
        """How many times this run has been started; the generation of its trainer group."""

    @property
    def capture_log(self) -> Path:
        """Append-only log of committed captures."""
        return self.path / "captures.jsonl"

    @property
    def telemetry(self) -> Path:
        """History of metrics and events, JSON lines."""
        return self.path / "telemetry.jsonl"

    @property
    def evaluations(self) -> Path:
        """Decoded τ by checkpoint, JSON lines."""
        return self.path / "evaluations.jsonl"

    @property
    def summary(self) -> Path:
        """What the last attempt ended with."""
        return self.path / "summary.json"


@contextmanager
def claim_output_dir(recipe: Recipe) -> Iterator[OutputDir]:
    """Hold the recipe's output directory for this process; a new one is created, one of the same run is gone on with.

    Raises:
        OutputDirError: Another process holds it, it holds another run, or it holds files that are no run's.
    """
    path = recipe.output_dir.expanduser().resolve()
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = os.open(path / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise OutputDirError(
            f"cannot write to output_dir {path}: {error.strerror}; choose another --output-dir"
        ) from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OutputDirError(
                f"output_dir {path} is in use by another slipstream process; wait for it, stop it, "
                "or choose another --output-dir"
            ) from error
        yield OutputDir(path, *_enter_run(path, recipe))
    finally:
        os.close(lock)


def _enter_run(path: Path, recipe: Recipe) -> tuple[str, int]:
    """Check that the directory is new or this recipe's; returns the run's id and the number of this attempt."""
    record = path / "run.json"
    attempt = 1
    if record.exists():
        saved = json.loads(record.read_text())
        changed = sorted(_differences(saved["identity"], recipe.identity()))
        if changed:
            raise OutputDirError(
                f"output_dir {path} holds another run ({saved['run_id']}): {', '.join(changed)} differ. "
                "Choose another --output-dir, or use the recipe.yaml saved in it to go on with that run"
            )
        run_id, attempt = saved["run_id"], saved["attempt"] + 1
    elif any(entry.name != ".lock" for entry in path.iterdir()):
        raise OutputDirError(f"output_dir {path} holds files that are no slipstream run; choose another --output-dir")
    else:
        run_id = f"{recipe.name}-{secrets.token_hex(3)}"
    content = {"run_id": run_id, "attempt": attempt, "identity": recipe.identity()}
    new = record.with_suffix(".new")
    new.write_text(json.dumps(content, indent=2) + "\n")
    new.replace(record)
    (path / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False))
    return run_id, attempt


def _differences(saved: Any, wanted: Any, prefix: str = "") -> Iterator[str]:
    """Names of the settings in which two identities differ."""
    if isinstance(saved, dict) and isinstance(wanted, dict):
        for key in saved.keys() | wanted.keys():
            yield from _differences(saved.get(key), wanted.get(key), f"{prefix}{key}.")
    elif saved != wanted:
        yield f"{prefix.rstrip('.')} ({saved!r} there, {wanted!r} here)"
