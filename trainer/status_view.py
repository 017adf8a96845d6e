"""How a running job looks in another terminal: `slipstream status`, once or live."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from services.contracts import TargetState
from services.control.records import RunStateName, RunStatus
from trainer.summary import format_bytes

STALE_S = 10.0
"""A driver posts about once a second; one that has not for so long hangs or has died."""

NAME_WIDTH, FIGURE_WIDTH, BAR_WIDTH = 26, 20, 40
SHOWN_EVENTS = 6

RUN_STYLES: dict[RunStateName, str] = {
    "starting": "cyan",
    "training": "bold green",
    "pausing": "yellow",
    "paused": "bold yellow",
    "stopping": "yellow",
    "measuring": "cyan",
}
TARGET_STYLES = {
    "pending": "yellow",
    "loading": "cyan",
    "serving": "green",
    "silent": "yellow",
    "quarantined": "bold yellow",
    "draining": "cyan",
    "failed": "bold red",
}


def run_view(status: RunStatus, now_s: float) -> RenderableType:
    """Everything about one run.

    Args:
        status: Its driver's last word.
        now_s: Wall clock, for ages.
    """
    parts: list[RenderableType] = [_progress(status)]
    if status.metrics:
        parts.append(_acceptance(status))
    parts += [_figures(status), _targets(status)]
    if status.events:
        parts.append(_events(status, now_s))
    parts.append(Text(_origin(status, now_s), "dim", overflow="fold"))
    if (age_s := now_s - status.posted_s) > STALE_S:
        parts.append(Text(f"the driver has said nothing for {format_age(age_s)}: it hangs or has died", "bold red"))
    title = Text.assemble((status.run_id, "bold"), "  ", (status.state, RUN_STYLES[status.state]))
    return Panel(Group(*parts), title=title, title_align="left")


def runs_view(statuses: Sequence[RunStatus], now_s: float) -> RenderableType:
    """One line for each run."""
    if not statuses:
        return Text("no run is on this cluster")
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("run", "state", "step", "expected τ", "targets", "buffer", "running for"):
        table.add_column(column)
    for status in statuses:
        expected = status.metrics.get("tau_probabilistic")
        table.add_row(
            Text(status.run_id, "bold"),
            Text(status.state, RUN_STYLES[status.state]),
            _steps(status),
            "" if expected is None else f"{expected:.2f}",
            _serving(status),
            f"{format_bytes(status.resident_bytes)} of {format_bytes(status.capacity_bytes)}",
            format_age(now_s - status.started_s),
        )
    return table


def format_age(seconds: float) -> str:
    """A time span for people: 42 s, 7 min, 3 h 20 min."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _steps(status: RunStatus) -> str:
    return f"{status.step:,}" + (f" of {status.total_steps:,}" if status.total_steps else "")


def _serving(status: RunStatus) -> str:
    serving = sum(target.state == "serving" for target in status.targets)
    return f"{serving} of {status.num_targets_wanted} serving"


def _grid() -> Table:
    """Three columns that stand below each other in all parts of the view."""
    grid = Table.grid(padding=(0, 1))
    grid.add_column(min_width=NAME_WIDTH)
    grid.add_column(min_width=FIGURE_WIDTH)
    grid.add_column()
    return grid


def _progress(status: RunStatus) -> RenderableType:
    grid = _grid()
    bar = ProgressBar(total=status.total_steps or None, completed=status.step, width=BAR_WIDTH)
    grid.add_row(Text(status.phase, "dim"), f"step {_steps(status)}", bar if status.total_steps else "")
    return grid


def _acceptance(status: RunStatus) -> RenderableType:
    grid = _grid()
    metrics = status.metrics
    if (expected := metrics.get("tau_probabilistic")) is not None:
        grid.add_row("expected accepted length", Text(f"{expected:5.2f}", "bold green"), "")
    position = 0
    while (rate := metrics.get(f"accept_rate@{position}")) is not None:
        bar = ProgressBar(total=1.0, completed=rate, width=BAR_WIDTH)
        grid.add_row(f"  acceptance at position {position + 1}", f"{rate:5.2f}", bar)
        position += 1
    for point in status.evaluations:
        low, high = point.interval
        grid.add_row(
            f"decoded τ {point.label}", f"{point.accepted_length:5.2f}", f"95 % interval {low:.2f} – {high:.2f}"
        )
    return grid


def _figures(status: RunStatus) -> RenderableType:
    grid = _grid()
    fill = ProgressBar(total=max(1, status.capacity_bytes), completed=status.resident_bytes, width=BAR_WIDTH)
    used = f"{format_bytes(status.resident_bytes)} of {format_bytes(status.capacity_bytes)}"
    grid.add_row("replay buffer", used, fill)
    grid.add_row("captured", f"{status.tokens_captured:,} tokens", f"{status.capture_tokens_per_s:,.0f} a second")
    grid.add_row("trained", f"{status.tokens_trained:,} tokens", f"{status.train_tokens_per_s:,.0f} a second")
    if (loss := status.metrics.get("loss")) is not None:
        grid.add_row("loss", f"{loss:.3f}", f"learning rate {status.learning_rate:.2e}")
    if status.trainer_wait_fraction is not None:
        grid.add_row("trainer waits", f"{status.trainer_wait_fraction:.1%}", "of its time")
    return grid


def _targets(status: RunStatus) -> RenderableType:
    grid = _grid()
    grid.add_row("targets", _serving(status), Text(_bounds(status), "dim"))
    for target in status.targets:
        grid.add_row(f"  {target.index}", Text(target.state, TARGET_STYLES[target.state]), _target_note(target))
    return grid


def _bounds(status: RunStatus) -> str:
    own = status.autoscaling
    if own is None:
        return f"at most {status.num_targets_most}"
    between = f"between {own.min} and {own.max}"
    return f"autoscaled {between}" if own.is_on else f"autoscaling {between} is suspended"


def _target_note(target: TargetState) -> Text:
    note = ", ".join(part for part in (target.address, target.message) if part)
    return Text(note, "dim", overflow="fold")


def _events(status: RunStatus, now_s: float) -> RenderableType:
    grid = Table.grid(padding=(0, 1))
    for event in status.events[-SHOWN_EVENTS:]:
        age = Text(f"{format_age(now_s - event.time_s)} ago", "dim")
        grid.add_row(Text("!", "yellow"), age, Text(event.message, overflow="fold"))
    return grid


def _origin(status: RunStatus, now_s: float) -> str:
    resumed = f", attempt {status.attempt}" if status.attempt > 1 else ""
    return (
        f"{status.algorithm} for {status.target_model}, in {status.output_dir}{resumed}; "
        f"driver {status.pid} on {status.host} for {format_age(now_s - status.started_s)}"
    )
