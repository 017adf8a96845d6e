"""Reads a running job's numbers from its telemetry, its table and its coordinator, and keeps their history."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from evaluation.report import Report
from services.contracts import Autoscaling, Event, TableInfo, TargetState
from services.errors import ReplayUnavailableError, TableLostError
from services.prompts.coordinator import Progress
from services.replay.links import sum_infos
from services.running_means import RunningMeans
from services.telemetry import Journal, TelemetryReader
from trainer.checkpoint import checkpoint_step
from trainer.console import RunConsole, RunState
from trainer.rate import WindowedRate

FIGURES_S = 1.0
"""How often the coordinator is asked for the ledger's figures and the table for its bytes."""

REDIS_AWAY_S = 180.0
"""How long Redis, or the table in it, may be away; both are brought back within seconds."""

ELSEWHERE_S = 20.0
"""A driver that has not looked for so long was bringing something back, and what is away has its whole time again. One
question to a Redis that hangs takes less."""

RATE_WINDOW_S = 10.0
"""Tokens a second are counted over so long."""


class Tables(Protocol):
    """What the observer asks of the run's tables."""

    def infos(self) -> list[TableInfo]:
        """Every table's state now."""
        ...


class Observer:
    """Turns what the parts report into one `RunState`, shows it, and hands it to the run's journal as records.

    Args:
        console: Where the run is shown in the terminal.
        journal: Takes every record, those of the ranks and those made here (`services.telemetry` lists the kinds).
        telemetry: The ranks' and shards' records.
        tables: The run's tables, for their bytes.
        progress: The coordinator's figures of now.
        targets: What each target does now.
        started_s: Wall-clock time at which the user's command began.
        autoscaling: Whether the run scales its targets by itself.

    Attributes:
        tables: What the tables last said of themselves.
    """

    def __init__(
        self,
        console: RunConsole,
        journal: Journal,
        telemetry: TelemetryReader,
        tables: Tables,
        progress: Callable[[], Progress],
        targets: Callable[[], Sequence[TargetState]],
        started_s: float,
        autoscaling: Callable[[], Autoscaling | None] = lambda: None,
    ) -> None:
        self.tables = tuple(tables.infos())
        """Of each shard, as last read."""
        self._autoscaling = autoscaling
        info = sum_infos(self.tables)
        self.state = RunState(capacity_bytes=info.capacity_bytes)
        self.events: list[Event] = []
        self.first_step_s: float | None = None
        self._console = console
        self._journal = journal
        self._telemetry = telemetry
        self._tables = tables
        self._progress = progress
        self._targets = targets
        self._started_s = started_s
        self._phase = "starting"
        self.peak_bytes = info.peak_bytes
        """Most bytes of features at once, over all tables that this attempt has had. With several shards an upper
        bound: each had its peak at its own moment."""
        self._redis_away_since_s: float | None = None
        self._looked_s = 0.0
        self._next_figures_s = 0.0
        self._means = RunningMeans()
        self._capture_rate, self._train_rate = WindowedRate(RATE_WINDOW_S), WindowedRate(RATE_WINDOW_S)

    def phase(self, text: str) -> None:
        """Show what the run does now."""
        self._phase = text
        self._console.phase(text)
        self._write_figures()

    def look(self, *, now: bool = False) -> None:
        """Read what is new and show it.

        Args:
            now: Read the figures too, however new the last ones are.

        Raises:
            ReplayUnavailableError: Redis has not answered for `REDIS_AWAY_S`, in which it was asked all along.
            TableLostError: A table has been away for so long.
            DeadlineError: The coordinator does not answer.
        """
        now_s = time.monotonic()
        try:
            self.drain()
            if now or now_s >= self._next_figures_s:
                self._next_figures_s = now_s + FIGURES_S
                self._read_figures(now_s)
                self._write_figures()
            self._redis_away_since_s = None
        except (ReplayUnavailableError, TableLostError):
            failed_s = time.monotonic()
            if self._redis_away_since_s is None or failed_s > self._looked_s + ELSEWHERE_S:
                self._redis_away_since_s = failed_s
            if failed_s > self._redis_away_since_s + REDIS_AWAY_S:
                raise
        self._looked_s = time.monotonic()
        self._console.update(self.state)

    def beat(self) -> None:
        """Where table and coordinator have done their work: say about once a second that the run is alive."""
        now_s = time.monotonic()
        if now_s >= self._next_figures_s:
            self._next_figures_s = now_s + FIGURES_S
            self._write_figures()
        self._console.update(self.state)

    def drain(self) -> None:
        """Take in the records that have come since the last time.

        Raises:
            ReplayUnavailableError: Redis does not answer.
        """
        for record in self._telemetry.read(block_ms=0):
            if record["kind"] == "event":
                self.report(Event(time_s=record["time_s"], kind=record["event"], message=record["message"]))
                continue
            self._journal.take(record)
            if record["kind"] == "step":
                self._read_step(record)

    def report(self, event: Event) -> None:
        """Show an event, record it, and keep it for the summary."""
        self.events.append(event)
        self._journal.write("event", time_s=event.time_s, event=event.kind, message=event.message)
        self._console.event(event)

    def show_report(self, report: Report) -> None:
        """Show and record decoded τ that has come in."""
        others = [found for found in self.state.accepted if found[0] != report.label]
        self.state.accepted = [*others, (report.label, report.accepted_length)]
        self._journal.write(
            "evaluation",
            label=report.label,
            step=checkpoint_step(Path(report.checkpoint)),
            began_s=report.began_s,
            num_samples=report.num_samples,
            accepted_length=report.accepted_length,
            interval=report.interval,
            accept_rate=report.accept_rate,
            cond_accept_rate=report.cond_accept_rate,
            domains={name: figures.model_dump(mode="json") for name, figures in report.domains.items()},
            lossless=report.lossless,
            first_divergence=report.first_divergence and report.first_divergence.model_dump(mode="json"),
        )
        low, high = report.interval
        self._console.say(
            f"decoded τ of {report.label}: {report.accepted_length:.2f} ({low:.2f} – {high:.2f}) on "
            f"{report.num_samples} prompts"
        )
        if found := report.first_divergence:
            self._console.say(f"greedy output of prompt {found.sample} left the target's own {found.place}")

    def progress(self) -> Progress:
        """The coordinator's figures now; the state takes them over.

        Raises:
            DeadlineError: It does not answer.
        """
        progress = self._progress()
        self.state.tokens_captured = progress.tokens_captured
        self.state.tokens_trained = progress.tokens_trained
        return progress

    def _read_step(self, record: dict[str, Any]) -> None:
        if self.first_step_s is None:
            self.first_step_s = record["time_s"] - self._started_s
            self.phase("training")
        self.state.step = record["step"]
        self.state.total_steps = record["total_steps"]
        self.state.metrics = self._means.add(record["metrics"])
        self.state.wait_fraction = record["wait_fraction"]

    def _read_figures(self, now_s: float) -> None:
        progress = self.progress()
        self.tables = tuple(self._tables.infos())
        info = sum_infos(self.tables)
        self.state.capture_tokens_per_s = self._capture_rate.add(now_s, progress.tokens_captured)
        self.state.train_tokens_per_s = self._train_rate.add(now_s, progress.tokens_trained)
        self.state.resident_bytes = info.resident_bytes
        self.peak_bytes = max(self.peak_bytes, info.peak_bytes)

    def _write_figures(self) -> None:
        state = self.state
        self._journal.write(
            "figures",
            phase=self._phase,
            step=state.step,
            tokens_captured=state.tokens_captured,
            tokens_trained=state.tokens_trained,
            capture_tokens_per_s=state.capture_tokens_per_s,
            resident_bytes=state.resident_bytes,
            shard_bytes=[info.resident_bytes for info in self.tables],
            peak_bytes=self.peak_bytes,
            capacity_bytes=state.capacity_bytes,
            targets=[target.model_dump(mode="json") for target in self._targets()],
            autoscaling=own.model_dump() if (own := self._autoscaling()) else None,
        )
