"""Reads a running job's numbers from its telemetry, its table and its coordinator, and keeps their history."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from evaluation.report import Report
from services.contracts import Event
from services.prompts.coordinator import Progress
from services.replay.table import RedisTable
from services.telemetry import TelemetryReader
from trainer.cluster import ANSWER_DEADLINE_S, result_of
from trainer.console import RunConsole, RunState

PROGRESS_S = 1.0
"""How often the coordinator is asked for the ledger's figures and the table for its bytes."""


SMOOTHING_STEPS = 20
"""Metrics on display are running means over about so many steps; the history keeps each step's own."""


class Observer:
    """Turns what the parts report into one `RunState`, shows it, and appends it to the run's history."""

    def __init__(
        self,
        console: RunConsole,
        history: Path,
        telemetry: TelemetryReader,
        table: RedisTable,
        coordinator: Any,
        started_s: float,
    ) -> None:
        self.state = RunState(capacity_bytes=table.info().capacity_bytes)
        self.events: list[Event] = []
        self.first_step_s: float | None = None
        self._console = console
        self._history = history
        self._telemetry = telemetry
        self._table = table
        self._coordinator = coordinator
        self._started_s = started_s
        self._next_progress_s = 0.0
        self._num_steps = 0
        self._captured: tuple[float, int] | None = None

    def look(self) -> None:
        """Read what is new and show it."""
        records = self._telemetry.read(block_ms=0)
        self._remember(records)
        for record in records:
            if record["kind"] == "step":
                self._read_step(record)
            elif record["kind"] == "event":
                self.report(Event(time_s=record["time_s"], kind=record["event"], message=record["message"]))
        now_s = time.monotonic()
        if now_s >= self._next_progress_s:
            self._next_progress_s = now_s + PROGRESS_S
            self._read_figures(now_s)
        self._console.update(self.state)

    def report(self, event: Event) -> None:
        """Show an event and keep it for the summary."""
        self.events.append(event)
        self._console.event(event)

    def show_reports(self, reports: list[Report]) -> None:
        """Show decoded τ that has come in."""
        for report in reports:
            self.state.accepted.append((report.label, report.accepted_length))
            low, high = report.interval
            self._console.say(f"decoded τ of {report.label}: {report.accepted_length:.2f} ({low:.2f} – {high:.2f})")

    def progress(self) -> Progress:
        """The coordinator's figures now.

        Raises:
            DeadlineError: It does not answer.
        """
        future = self._coordinator.progress.remote()
        progress: Progress = result_of(future, "the coordinator", timeout_s=ANSWER_DEADLINE_S)
        return progress

    def _remember(self, records: list[dict[str, Any]]) -> None:
        if records:
            with self._history.open("a") as history:
                history.write("".join(json.dumps(record) + "\n" for record in records))

    def _read_step(self, record: dict[str, Any]) -> None:
        if self.first_step_s is None:
            self.first_step_s = record["time_s"] - self._started_s
            self._console.phase("training")
        self.state.step = record["step"]
        self.state.total_steps = record["total_steps"]
        self._num_steps += 1
        weight = 1 / min(self._num_steps, SMOOTHING_STEPS)
        self.state.metrics = {
            name: (1 - weight) * self.state.metrics.get(name, value) + weight * value
            for name, value in record["metrics"].items()
        }
        self.state.train_tokens_per_s = record["tokens_per_s"]
        self.state.wait_fraction = record["wait_fraction"]

    def _read_figures(self, now_s: float) -> None:
        progress, info = self.progress(), self._table.info()
        if self._captured is not None:
            then_s, then_tokens = self._captured
            self.state.capture_tokens_per_s = (progress.tokens_captured - then_tokens) / (now_s - then_s)
        self._captured = (now_s, progress.tokens_captured)
        self.state.tokens_captured = progress.tokens_captured
        self.state.tokens_trained = progress.tokens_trained
        self.state.resident_bytes = info.resident_bytes
