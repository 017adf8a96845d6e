"""The `slipstream` command as a user starts it, and the processes it leaves behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import psutil
from waiting import wait_until

MARK = "SLIPSTREAM_TEST_MARK"
"""Every descendant inherits this variable, so a run's processes are found wherever they have moved to."""

SMALL = ("evaluation.max_samples=3", "evaluation.max_new_tokens=32", "trainer.checkpoint_every=5")
"""Overrides that keep a run short without leaving a part out."""


class Command:
    """One invocation of the command line, in a process group of its own."""

    def __init__(self, arguments: list[str], folder: Path) -> None:
        self._mark = uuid.uuid4().hex
        self._errors = folder / f"stderr-{self._mark}.txt"
        with self._errors.open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "trainer", *arguments],
                cwd=folder,
                env={**os.environ, MARK: self._mark},
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                start_new_session=True,
            )

    @property
    def errors(self) -> str:
        """What it has written to stderr."""
        return self._errors.read_text()

    def result(self, timeout_s: float = 170) -> tuple[int, str]:
        """Exit code and stdout."""
        output, _ = self.process.communicate(timeout=timeout_s)
        return self.process.returncode, output

    def json(self, timeout_s: float = 170) -> dict[str, Any]:
        """The one JSON object on stdout of a command that succeeds."""
        code, output = self.result(timeout_s)
        assert code == 0, self.errors
        assert output.count("\n") == 1, f"stdout holds more than one line: {output!r}"
        answer: dict[str, Any] = json.loads(output)
        return answer

    def signal_group(self, number: signal.Signals) -> None:
        """Send a signal to the whole process group, as a terminal or a supervisor does."""
        os.killpg(self.process.pid, number)

    def left_behind(self) -> list[str]:
        """Command lines of living processes that this command started, however far down."""
        return [line for line in map(self._marked, psutil.process_iter()) if line]

    def _marked(self, process: psutil.Process) -> str | None:
        try:
            if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARK) == self._mark:
                return f"{process.pid} {' '.join(process.cmdline())[:120]}"
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            pass
        return None

    def assert_nothing_left(self, within_s: float) -> None:
        """Fail unless every process has ended within the time given."""
        wait_until(lambda: not self.left_behind(), lambda: f"left behind: {self.left_behind()}", within_s)


def steps_done(output_dir: Path) -> int:
    """The newest optimizer step in a run's telemetry."""
    return max((record["step"] for record in records(output_dir, "step")), default=0)


def steps_measured(output_dir: Path) -> set[int]:
    """Steps of the checkpoints that a run's telemetry has evaluations of."""
    return {record["step"] for record in records(output_dir, "evaluation")}


def records(output_dir: Path, kind: str) -> list[dict[str, Any]]:
    """Of one kind, in a run's telemetry."""
    history = output_dir / "telemetry.jsonl"
    lines = history.read_text().splitlines() if history.exists() else []
    return [record for record in map(json.loads, lines) if record["kind"] == kind]
