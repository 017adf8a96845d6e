"""What `slipstream eval` shows: progress with τ so far, and the table at the end."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from evaluation.records import PlainRecord, RecordLog, SampleRecord
from evaluation.results import Figures, Results
from evaluation.session import Session
from evaluation.timing import Timing
from trainer.decoding_progress import DecodingProgress

NOTHING = "–"

SHOWN_POSITIONS = 3
"""Positions of a draft whose acceptance the table has; the files have all."""


class EvaluationDisplay(DecodingProgress):
    """Progress over all tasks."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._tokens: defaultdict[str, int] = defaultdict(int)
        self._rounds: defaultdict[str, int] = defaultdict(int)

    def begin(self, log: RecordLog, num_left: int) -> None:
        """Take in what is decoded already; so many records are to come."""
        for record in log.samples.values():
            self._count(record)
        num_done = len(log.samples) + len(log.plain)
        self.restart(num_done, num_done + num_left, where=f" in {log.folder}")

    def on_record(self, record: SampleRecord | PlainRecord) -> None:
        """Show one more."""
        if isinstance(record, SampleRecord):
            self._count(record)
        self.one_more(self.line(record.task))

    def line(self, task: str) -> str:
        """τ so far, of a task and of all."""
        overall = _ratio(sum(self._tokens.values()), sum(self._rounds.values()))
        return f"{task} τ {_ratio(self._tokens[task], self._rounds[task])} · all τ {overall}"

    def _count(self, record: SampleRecord) -> None:
        self._tokens[record.task] += sum(record.accepted_lengths)
        self._rounds[record.task] += len(record.accepted_lengths)


def results_table(session: Session, results: Results, warnings: Sequence[str]) -> Table:
    """Figures by task, domain and over all; warnings stand below them, in the table."""
    settings = session.settings
    temperature = "greedy" if session.is_greedy else f"temperature {settings.temperature:g}"
    title = f"{session.algorithm} at {settings.drafter}\nfor {settings.target}, {temperature}"
    caption = Text.assemble(
        ("αk: part of the rounds with a k-th draft that accepted it", "dim"),
        *([("\nd/v/r: part of the time that drafting, verifying and the rest take", "dim")] * settings.measure_speedup),
        *((f"\n! {warning}", "yellow") for warning in warnings),
    )
    table = Table(
        title=title, title_justify="left", caption=caption, caption_justify="left", box=SIMPLE_HEAD, pad_edge=False
    )
    table.add_column("task", no_wrap=True)
    for name in ("samples", "τ", "95 %"):
        table.add_column(name, justify="right", no_wrap=True)
    if session.published:
        table.add_column("published", justify="right")
    positions = min(SHOWN_POSITIONS, len(results.overall.accept_rate))
    if positions:
        drafts = "/".join(str(k + 1) for k in range(positions))
        table.add_column(f"α{drafts} %", justify="right", no_wrap=True)
    if settings.measure_speedup:
        table.add_column("speedup", justify="right", no_wrap=True)
        table.add_column("d/v/r %", justify="right", no_wrap=True)

    def add(name: str, figures: Figures, style: str) -> None:
        low, high = figures.interval or (None, None)
        cells = [name, str(figures.samples), _number(figures.accepted_length), f"{_number(low)} – {_number(high)}"]
        if session.published:
            cells.append(_number(figures.published))
        if positions:
            cells.append(_percent([*figures.accept_rate, *[None] * positions][:positions]))
        if settings.measure_speedup:
            cells += [NOTHING if figures.speedup is None else f"{figures.speedup:.2f}×", _parts(figures.speculative)]
        table.add_row(*cells, style=style)

    for domain, subtotal in results.domains.items():
        names = [task.name for task in session.tasks if task.domain == domain]
        for name in names:
            add(name, results.tasks[name], "")
        if len(names) > 1:
            add(f"{domain}, all", subtotal, "bold")
        table.add_section()
    if len(results.tasks) > 1:
        add("all samples", results.overall, "bold green")
    return table


def _parts(timing: Timing) -> str:
    """Drafting, verifying and the rest, in per cent of the time."""
    if not timing.total_s:
        return NOTHING
    rest_s = timing.prefill_s + timing.overhead_s
    return _percent([part_s / timing.total_s for part_s in (timing.draft_s, timing.verify_s, rest_s)])


def _percent(parts: Sequence[float | None]) -> str:
    return "/".join(NOTHING if part is None else f"{100 * part:.0f}" for part in parts)


def _number(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.2f}"


def _ratio(tokens: int, rounds: int) -> str:
    return f"{tokens / rounds:.2f}" if rounds else NOTHING
