"""The `slipstream` command as a user starts it, and the processes it leaves behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
from waiting import wait_until

from trainer.cluster import MOST_STARTS, START_FAILED

RUN_S = 600.0
"""A run of the tests has ended by then, or has come to where a test waits for it, on a busy machine, too."""

GONE_S = 120.0
"""What a command leaves has ended by then; the reaper of a local Ray alone waits for some seconds."""

COMMAND_S = 600.0
"""A command that does no more than ask and answer."""

RAY_BYTES = 80 * 1024**2
"""Ray's smallest object store, nearly."""

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

    def result(self, timeout_s: float = RUN_S) -> tuple[int, str]:
        """Exit code and stdout."""
        output, _ = self.process.communicate(timeout=timeout_s)
        return self.process.returncode, output

    def json(self, timeout_s: float = RUN_S) -> dict[str, Any]:
        """The one JSON object on stdout of a command that succeeds."""
        code, output = self.result(timeout_s)
        assert code == 0, self.errors
        assert output.count("\n") == 1, f"stdout holds more than one line: {output!r}"
        answer: dict[str, Any] = json.loads(output)
        return answer

    def wait_until(self, condition: Callable[[], object], what: str = "") -> None:
        """Wait until the command, which must not end before, has come so far."""

        def holds() -> object:
            has_ended = self.process.poll() is not None
            return condition() or has_ended

        wait_until(holds, lambda: f"{what}\n{self.errors}", RUN_S)
        assert condition(), f"it ended before: {what}\n{self.errors}"

    def signal_group(self, number: signal.Signals) -> None:
        """Send a signal to the whole process group, as a terminal or a supervisor does."""
        os.killpg(self.process.pid, number)

    def left_behind(self) -> list[str]:
        """Command lines of living processes that this command started, however far down."""
        return [f"{pid} {line}" for pid, line in marked(self._mark).items()]

    def assert_nothing_left(self) -> None:
        """Fail unless every process ends."""
        wait_until(lambda: not self.left_behind(), lambda: f"left behind: {self.left_behind()}", GONE_S)

    def kill(self) -> None:
        """End whatever it has left."""
        kill_marked(self._mark)


def marked(mark: str) -> dict[int, str]:
    """Command lines of the living processes that carry a mark, by process id."""
    found = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):  # it has just ended, or is another user's
            if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARK) == mark:
                found[process.pid] = " ".join(process.cmdline()).strip()
    return found


def kill_marked(mark: str) -> None:
    """Kill every process that carries a mark, those that are just being started, too."""

    def are_killed() -> bool:
        left = marked(mark)
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return not left

    wait_until(are_killed, lambda: f"left: {marked(mark)}", GONE_S)


def start_ray(options: Sequence[str], environment: Mapping[str, str]) -> str:
    """`ray start`; returns what it prints. Like a run's own, a Ray that did not start in time is started anew."""
    command = [str(Path(sys.executable).parent / "ray"), "start", *options]
    command += ["--object-store-memory", str(RAY_BYTES), "--num-gpus", "0"]
    for start in range(1, MOST_STARTS + 1):
        started = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=COMMAND_S)
        if started.returncode == 0:
            return started.stdout
        said = started.stdout + started.stderr
        assert START_FAILED in said, said
        assert start < MOST_STARTS, said
        if "--head" in options:
            kill_marked(environment[MARK])
    raise AssertionError("unreachable")


def steps_done(output_dir: Path) -> int:
    """The newest optimizer step in a run's telemetry."""
    return max((record["step"] for record in records(output_dir, "step")), default=0)


def steps_measured(output_dir: Path) -> set[int]:
    """Steps of the checkpoints that a run's telemetry has evaluations of."""
    return {record["step"] for record in records(output_dir, "evaluation")}


def records(output_dir: Path, kind: str) -> list[dict[str, Any]]:
    """Of one kind, in a run's telemetry."""
    history = output_dir / "telemetry.jsonl"
    whole, _, _ = history.read_text().rpartition("\n") if history.exists() else ("", "", "")  # a line may be under way
    return [record for record in map(json.loads, whole.splitlines()) if record["kind"] == kind]
