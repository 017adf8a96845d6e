"""What a run shows in the terminal: phases, progress, live acceptance, and the table at the end.

On a terminal this is a live display; elsewhere (a log, a pipe) it is a line every few seconds. With `--json` all of
it goes to stderr.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from services.contracts import Event
from trainer.evaluation_cost import EvaluationCost
from trainer.summary import Summary, format_bytes
from trainer.traffic import FeatureTraffic

PLAIN_INTERVAL_S = 10.0
"""Seconds between progress lines where there is no terminal."""

CURVE_POINTS = 40

NEWEST_ACCEPTED = 3
"""Measured checkpoints on display, beside the first."""
BARS = "▁▂▃▄▅▆▇█"


@dataclass
class RunState:
    """The numbers on display, kept up to date by the driver."""

    step: int = 0
    total_steps: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    resident_bytes: int = 0
    capacity_bytes: int = 1
    tokens_captured: int = 0
    tokens_trained: int = 0
    capture_tokens_per_s: float = 0.0
    train_tokens_per_s: float = 0.0
    wait_fraction: float | None = None
    accepted: list[tuple[str, float]] = field(default_factory=list)
    """Decoded τ so far: (label, τ)."""


class RunConsole:
    """Shows one run; a context manager around it."""

    def __init__(self, *, to_stderr: bool) -> None:
        # The stream of now: a run sends what libraries print elsewhere.
        self.console = Console(file=sys.stderr if to_stderr else sys.stdout, highlight=False)
        self._state = RunState()
        self._curve: deque[float] = deque(maxlen=CURVE_POINTS)
        self._curve_step = 0
        self._live: Live | None = None
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("· left"),
            TimeRemainingColumn(),
            console=self.console,
        )
        self._task = self._progress.add_task("starting", total=None)
        self._next_line_s = 0.0

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self._live = Live(console=self.console, get_renderable=self._render, refresh_per_second=4, transient=True)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()

    def say(self, text: RenderableType) -> None:
        """Something that stays on the screen."""
        self.console.print(text, soft_wrap=isinstance(text, str), markup=False)

    def error(self, message: str) -> None:
        """Why the command failed; always on stderr."""
        Console(stderr=True, highlight=False).print(Text("error: ", "bold red") + Text(message), soft_wrap=True)

    def phase(self, text: str) -> None:
        """What the run is doing now, for example 'starting Ray'."""
        self._progress.update(self._task, description=text)
        if not self._live:
            self.console.print(text)

    def event(self, event: Event) -> None:
        """A restart, a skip, a scaling: stays on the screen."""
        self.console.print(Text("! ", "yellow") + Text(event.message), soft_wrap=True)

    def update(self, state: RunState) -> None:
        """Show new numbers."""
        self._state = state
        if state.step > self._curve_step and "tau_probabilistic" in state.metrics:
            self._curve.append(state.metrics["tau_probabilistic"])
            self._curve_step = state.step
        if state.total_steps:
            self._progress.update(self._task, total=state.total_steps, completed=state.step)
        if not self._live and time.monotonic() >= self._next_line_s and state.step:
            self._next_line_s = time.monotonic() + PLAIN_INTERVAL_S
            self.console.print(self._line(), soft_wrap=True)

    def _line(self) -> str:
        state = self._state
        parts = [f"step {state.step}/{state.total_steps}"]
        if "loss" in state.metrics:
            parts.append(f"loss {state.metrics['loss']:.3f}")
        if "tau_probabilistic" in state.metrics:
            parts.append(f"expected accepted length {state.metrics['tau_probabilistic']:.2f}")
        parts.append(f"buffer {format_bytes(state.resident_bytes)} of {format_bytes(state.capacity_bytes)}")
        parts.append(f"capture {state.capture_tokens_per_s:,.0f} tok/s, train {state.train_tokens_per_s:,.0f} tok/s")
        if state.wait_fraction is not None:
            parts.append(f"trainer waits {state.wait_fraction:.0%}")
        return " · ".join(parts)

    def _render(self) -> RenderableType:
        state = self._state
        rows: list[RenderableType] = [self._progress]
        if state.metrics:
            rows.append(self._acceptance())
        if state.step:
            rows.append(self._figures())
        return Group(*rows)

    def _acceptance(self) -> RenderableType:
        metrics = self._state.metrics
        table = Table.grid(padding=(0, 1))
        expected = metrics.get("tau_probabilistic", 0.0)
        table.add_row(
            "expected accepted length",
            Text(f"{expected:5.2f}", style="bold green"),
            Text(sparkline(self._curve), "green"),
        )
        position = 0
        while (rate := metrics.get(f"accept_rate@{position}")) is not None:
            bar = ProgressBar(total=1.0, completed=rate, width=CURVE_POINTS)
            table.add_row(f"  acceptance at position {position + 1}", f"{rate:5.2f}", bar)
            position += 1
        return table

    def _figures(self) -> RenderableType:
        state = self._state
        table = Table.grid(padding=(0, 1))
        fill = ProgressBar(total=state.capacity_bytes, completed=state.resident_bytes, width=CURVE_POINTS)
        used = f"{format_bytes(state.resident_bytes)} of {format_bytes(state.capacity_bytes)}"
        table.add_row("replay buffer", used, fill)
        table.add_row("captured", f"{state.tokens_captured:,} tokens", f"{state.capture_tokens_per_s:,.0f} a second")
        table.add_row("trained", f"{state.tokens_trained:,} tokens", f"{state.train_tokens_per_s:,.0f} a second")
        table.add_row("loss", f"{state.metrics.get('loss', float('nan')):.3f}", "")
        if state.wait_fraction is not None:
            table.add_row("trainer waits", f"{state.wait_fraction:.1%}", "of its time")
        for label, accepted in state.accepted[:1] + state.accepted[1:][-NEWEST_ACCEPTED:]:
            table.add_row(f"decoded τ {label}", f"{accepted:.2f}", "tokens a target forward")
        return table


def sparkline(values: deque[float] | list[float]) -> str:
    """A curve in one line of block characters, scaled to its own range."""
    if not values:
        return ""
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    return "".join(BARS[round((value - low) / span * (len(BARS) - 1))] for value in values)


def summary_table(summary: Summary) -> Table:
    """The table a run ends with."""
    table = Table(title=f"Slipstream run {summary.run_id}", title_justify="left", show_header=False, pad_edge=False)
    table.add_column(style="dim")
    table.add_column()
    if summary.accepted_length_start is not None and summary.accepted_length_end is not None:
        before = _with_interval(summary.accepted_length_start, summary.accepted_length_start_interval)
        after = _with_interval(summary.accepted_length_end, summary.accepted_length_end_interval)
        ratio = summary.accepted_length_end / summary.accepted_length_start
        table.add_row("τ before training", before)
        table.add_row("τ after training", Text.assemble((after, "bold green"), f"  ×{ratio:.2f}"))
    if summary.lossless is not None:
        equal, differs = (
            Text("equal to the target's own, token for token"),
            Text("DIFFERS from the target's own", "red"),
        )
        table.add_row("greedy output", equal if summary.lossless else differs)
    resumed = "" if summary.resumed_from_step is None else f" (resumed from step {summary.resumed_from_step})"
    table.add_row("optimizer steps", f"{summary.steps}{resumed}")
    if summary.final_loss is not None:
        table.add_row("final loss", f"{summary.final_loss:.3f}")
    table.add_row("tokens", f"{summary.tokens_captured:,} captured, {summary.tokens_trained:,} trained")
    peak, allowed = format_bytes(summary.peak_buffer_bytes), format_bytes(summary.buffer_capacity_bytes)
    table.add_row("features in memory", f"{peak} at the peak, of {allowed} allowed")
    table.add_row("features streamed", _describe_traffic(summary.features))
    avoided = format_bytes(summary.cache_bytes_avoided)
    if summary.peak_buffer_bytes:
        avoided += f" ({summary.cache_bytes_avoided / summary.peak_buffer_bytes:.0f} × the peak)"
    table.add_row("disk cache avoided", avoided)
    if summary.evaluation_cost is not None and summary.evaluation_cost.num_measured:
        table.add_row("measuring meanwhile", _describe_cost(summary.evaluation_cost))
    if summary.trainer_wait_fraction is not None:
        table.add_row("trainer waited", f"{summary.trainer_wait_fraction:.1%} of its time after the first step")
    first = f", first optimizer step after {summary.first_step_s:.0f} s" if summary.first_step_s is not None else ""
    table.add_row("time", f"{summary.total_s:.0f} s{first}")
    ledger = summary.ledger
    verdict = ("balanced", "green") if ledger.balanced else ("NOT balanced", "red")
    counts = (
        f": {ledger.planned:,} planned = {ledger.trained:,} trained + {ledger.skipped:,} skipped + "
        f"{ledger.not_reached:,} not reached; {ledger.captured:,} captures, {ledger.recaptured:,} of them again"
    )
    table.add_row("ledger of uses", Text.assemble(verdict, counts))
    table.add_row("drafter", summary.checkpoint)
    return table


def _describe_traffic(features: FeatureTraffic) -> str:
    streamed, all_rows = format_bytes(features.streamed_bytes), format_bytes(features.all_rows_bytes)
    parts = [f"{format_bytes(features.saved_by_rows_bytes)} by needed rows"]
    parts += [
        f"{format_bytes(saved)} by {dtype}" if saved > 0 else f"{format_bytes(-saved)} more for {dtype}"
        for dtype, saved in features.saved_by_dtype_bytes.items()
        if saved
    ]
    return f"{streamed}, where all rows in bf16 are {all_rows}: saved {', '.join(parts)}"


def _describe_cost(cost: EvaluationCost) -> str:
    measured = f"{cost.num_measured} checkpoint{'s' if cost.num_measured > 1 else ''}"
    if cost.ratio is None or cost.step_s_during is None or cost.step_s_otherwise is None:
        return f"{measured}; too few steps to say what that costs"
    return (
        f"{measured}; a step then took {1000 * cost.step_s_during:.0f} ms, otherwise "
        f"{1000 * cost.step_s_otherwise:.0f} ms (×{cost.ratio:.2f})"
    )


def _with_interval(value: float, interval: tuple[float, float] | None) -> str:
    return f"{value:.2f}" + (f"  (95 % interval {interval[0]:.2f} – {interval[1]:.2f})" if interval else "")
