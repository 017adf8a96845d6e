"""The output directory of a run: who owns it, what run it holds, where its files are.

run.json            id and identity of the run, number of its attempts and of its trainer groups
lives               how often a coordinator of the run began
recipe.yaml         the recipe as the last attempt resolved it
step_<N>/           checkpoints, step_latest points to the newest
captures.jsonl      every capture ever committed (the ledger's second log)
answers.jsonl       the target's own answers, where it is trained on these; further shards write answers-<N>.jsonl
redis.log           what the embedded Redis says; those of further shards write redis-<N>.log
draft_vocabulary.json  the tokens that are drafted, where the vocabulary is cut
telemetry.jsonl     history of metrics and events
evaluations.jsonl   decoded τ by checkpoint
tensorboard/        event files
logs/               JSON lines of each process; rank_<N>.log has what libraries print
summary.json        what the last attempt ended with
"""

from __future__ import annotations

import fcntl
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field

from services.errors import OutputDirError
from services.files import SUFFIX, replace_text
from services.logs import LogPlace
from services.reading import first_fault, read_json
from trainer.recipe import Recipe

RECORD, LOCK = "run.json", ".lock"

MOST_STARTS = 2**31
"""Attempts, and trainer groups, of a run: a larger number is no count of them."""


class _Record(BaseModel):
    """What `run.json` holds; what another version adds is passed over."""

    model_config = ConfigDict(frozen=True, strict=True)

    run_id: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    attempt: int = Field(ge=1, lt=MOST_STARTS)
    generation: int = Field(ge=0, lt=MOST_STARTS)
    identity: dict[str, Any]


class _Peak(BaseModel):
    """What is read of `summary.json`."""

    peak_buffer_bytes: int = Field(ge=0)


@dataclass(frozen=True)
class OutputDir:
    """A claimed output directory; make one with `claim_output_dir`.

    Attributes:
        path: The directory.
        run_id: The run in it.
        attempt: How many times this run has been started.
    """

    path: Path
    run_id: str
    attempt: int

    @property
    def capture_log(self) -> Path:
        """Append-only log of committed captures."""
        return self.path / "captures.jsonl"

    @property
    def lives(self) -> Path:
        """How often a coordinator of this run began."""
        return self.path / "lives"

    @property
    def answers(self) -> Path:
        """The target's own answers, JSON lines."""
        return self.path / "answers.jsonl"

    @property
    def telemetry(self) -> Path:
        """History of metrics and events, JSON lines."""
        return self.path / "telemetry.jsonl"

    @property
    def evaluations(self) -> Path:
        """Decoded τ by checkpoint, JSON lines."""
        return self.path / "evaluations.jsonl"

    @property
    def tensorboard(self) -> Path:
        """Folder of TensorBoard's event files."""
        return self.path / "tensorboard"

    def log_place(self, role: str, rank: int | None = None) -> LogPlace:
        """Where a process of this run logs to."""
        return LogPlace(folder=str(self.path / "logs"), run=self.run_id, role=role, rank=rank)

    @property
    def summary(self) -> Path:
        """What the last attempt ended with."""
        return self.path / "summary.json"

    def next_generation(self) -> int:
        """The number of a new trainer group, above those of all groups that this run ever had."""
        saved = _read_record(self.path / RECORD)
        saved = saved.model_copy(update={"generation": saved.generation + 1})
        _write_record(self.path / RECORD, saved)
        return saved.generation

    def earlier_peak_bytes(self) -> int:
        """Peak of the replay buffer in earlier attempts, as far as they came to an end.

        Raises:
            OutputDirError: The summary is none.
        """
        if not self.summary.exists():
            return 0
        try:
            return _Peak.model_validate(read_json(self.summary.read_bytes())).peak_buffer_bytes
        except ValueError as error:
            raise OutputDirError(
                f"{self.summary} is no summary of a slipstream run: {first_fault(error)}; remove it, the next attempt "
                "writes a new one"
            ) from error


@contextmanager
def claim_output_dir(recipe: Recipe) -> Iterator[OutputDir]:
    """Hold the recipe's output directory for this process; a new one is created, one of the same run is gone on with.

    Raises:
        OutputDirError: Another process holds it, it holds another run, or it holds files that are no run's.
    """
    path = recipe.output_dir.expanduser().resolve()
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not (path / LOCK).exists() and not (path / RECORD).exists():
            _refuse_foreign(path)  # before anything is written to it
        lock = os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
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
    record = path / RECORD
    attempt, generation = 1, 0
    if record.exists():
        saved = _read_record(record)
        changed = sorted(_differences(saved.identity, recipe.identity()))
        if changed:
            raise OutputDirError(
                f"output_dir {path} holds another run ({saved.run_id}): {', '.join(changed)} differ. "
                "Choose another --output-dir, or use the recipe.yaml saved in it to go on with that run"
            )
        run_id, attempt, generation = saved.run_id, saved.attempt + 1, saved.generation
    else:
        _refuse_foreign(path)
        run_id = f"{recipe.name}-{secrets.token_hex(3)}"
    _write_record(record, _Record(run_id=run_id, attempt=attempt, generation=generation, identity=recipe.identity()))
    replace_text(path / "recipe.yaml", yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False))
    return run_id, attempt


def _write_record(record: Path, content: _Record) -> None:
    replace_text(record, content.model_dump_json(indent=2) + "\n")


def _refuse_foreign(path: Path) -> None:
    if {entry.name for entry in path.iterdir()} - {LOCK, f"{RECORD}{SUFFIX}"}:
        raise OutputDirError(f"output_dir {path} holds files that are no slipstream run; choose another --output-dir")


def _read_record(record: Path) -> _Record:
    try:
        return _Record.model_validate(read_json(record.read_bytes()))
    except ValueError as error:
        raise OutputDirError(
            f"{record} is no record of a slipstream run: {first_fault(error)}; choose another --output-dir"
        ) from error


def _differences(saved: Any, wanted: Any, prefix: str = "") -> Iterator[str]:
    """Names of the settings in which two identities differ."""
    if isinstance(saved, dict) and isinstance(wanted, dict):
        for key in saved.keys() | wanted.keys():
            yield from _differences(saved.get(key), wanted.get(key), f"{prefix}{key}.")
    elif saved != wanted:
        yield f"{prefix.rstrip('.')} ({saved!r} there, {wanted!r} here)"
