"""What `slipstream compare` shows: progress over all drafters with τ so far, and the tables at the end."""

from __future__ import annotations

from collections import defaultdict

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from evaluation.compare.comparison import Comparison
from evaluation.compare.match import PLAIN
from evaluation.compare.report import difference_text, group_name, millions, number, percent, verdict, with_interval
from evaluation.records import PlainRecord, SampleRecord
from trainer.decoding_progress import DecodingProgress


class CompareDisplay(DecodingProgress):
    """Progress over all drafters."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._tokens: defaultdict[str, int] = defaultdict(int)
        self._rounds: defaultdict[str, int] = defaultdict(int)

    def begin(self, num_done: int, num_in_all: int) -> None:
        """So many records are there already, of so many."""
        self.restart(num_done, num_in_all, where=" where it stopped")

    def on_record(self, label: str, record: SampleRecord | PlainRecord) -> None:
        """Show one more."""
        if isinstance(record, SampleRecord):
            self._tokens[label] += sum(record.accepted_lengths)
            self._rounds[label] += len(record.accepted_lengths)
        self.one_more(f"{record.task}, {'no drafter' if label == PLAIN else label}{self._so_far()}")

    def _so_far(self) -> str:
        found = [f"{label} {self._tokens[label] / rounds:.2f}" for label, rounds in self._rounds.items() if rounds]
        return f" · τ {', '.join(found)}" if found else ""


def comparison_tables(comparison: Comparison) -> Group:
    """τ by group of samples, differences pair by pair, and costs; warnings below."""
    temperature = comparison.settings["temperature"]
    how = "greedy" if temperature == 0 else f"temperature {temperature:g}"
    return Group(
        Text(f"τ on the same prompts and seeds for {comparison.target}, {how}; 95 % intervals"),
        _lengths(comparison),
        Text("Difference of τ on the same resampled prompts; green: its interval leaves out 0"),
        _differences(comparison),
        Text("Cost of drafting over all samples, and speed"),
        _costs(comparison),
        Text(verdict(comparison).replace("**", ""), style="bold"),
        *(Text(f"! {warning}", style="yellow") for warning in comparison.warnings),
    )


def _lengths(comparison: Comparison) -> Table:
    built = _table("")
    for name in ("samples", *comparison.labels):
        built.add_column(name, justify="right")
    for group in comparison.shown_groups:
        found = [standing.figures(group) for standing in comparison.standings]
        style = "" if group[0] == "task" else "bold"
        built.add_row(
            group_name(group), str(found[0].samples), *(_tight(with_interval(one)) for one in found), style=style
        )
    return built


def _differences(comparison: Comparison) -> Table:
    built = _table("")
    for first, second in comparison.pairs:
        built.add_column(f"{first} − {second}", justify="right")
    for group in comparison.shown_groups:
        found = [comparison.difference(pair, group) for pair in comparison.pairs]
        cells = [
            Text(_tight(difference_text(one)), style="green" if one is not None and one.is_clear else "")
            for one in found
        ]
        built.add_row(group_name(group), *cells)
    return built


def _costs(comparison: Comparison) -> Table:
    built = _table("drafter")
    for name in ("parameters", "drafting, ms a round", "share of the time", "speedup"):
        built.add_column(name, justify="right")
    for standing in comparison.standings:
        cost = standing.cost(("all", "all"))
        built.add_row(
            standing.label if standing.label == standing.algorithm else f"{standing.label} ({standing.algorithm})",
            millions(standing.parameters.own),
            number(None if cost.round_s is None else 1000 * cost.round_s),
            percent(cost.share),
            number(standing.results.overall.speedup, unit="×"),
        )
    return built


def _table(first_column: str) -> Table:
    """Three drafters with their intervals fit 80 columns."""
    return Table(first_column, box=SIMPLE_HEAD, pad_edge=False)


def _tight(interval: str) -> str:
    return interval.replace(" – ", "–")
