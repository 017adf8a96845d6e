"""What `slipstream confidence` shows: progress, and the tables at the end."""

from __future__ import annotations

from rich.console import Group
from rich.table import Table
from rich.text import Text

from evaluation.confidence.study import Study
from trainer.decoding_progress import DecodingProgress

NOTHING = "–"


class StudyDisplay(DecodingProgress):
    """A bar for each stage."""

    def begin(self, stage: str, num_done: int, num_in_all: int) -> None:
        """A stage begins, or goes on."""
        self.restart(num_done, num_in_all, stage)

    def advance(self) -> None:
        """One more of the stage is done."""
        self.one_more()


def study_tables(study: Study) -> Group:
    """Calibration by position, the threshold sweep, and what the scheduler gains by concurrency."""
    parts = [_calibration_table(study), _sweep_table(study), _throughput_table(study)]
    return Group(*parts, *(Text(f"! {warning}", style="yellow") for warning in study.warnings))


def _calibration_table(study: Study) -> Table:
    title = (
        f"Predicted survival of each prefix against what happened, at {study.drafter}\n{study.num_rounds_judged:,} "
        f"rounds of {study.num_samples_judged} samples at temperature {study.decoding_temperature:g}; temperatures "
        f"fitted on {study.num_samples_fitted} others"
    )
    table = _table(title)
    for name in ("k", "rounds", "survived", "predicted", "ECE", "AUROC", "Brier", "T", "ECE at T"):
        table.add_column(name, justify="right")
    for before, after in zip(study.head, study.calibrated, strict=True):
        table.add_row(
            str(before.position + 1),
            str(before.num_rounds),
            f"{before.observed:.3f}",
            f"{before.predicted:.3f}",
            f"{before.ece:.3f}",
            _number(before.auroc),
            f"{before.brier:.3f}",
            f"{study.temperatures[before.position]:.2f}",
            f"{after.ece:.3f}",
        )
    return table


def _sweep_table(study: Study) -> Table:
    compared = "calibrated confidences" if study.calibrated_sweep else "the head's own confidences"
    table = _table(f"Thresholds, compared with {compared}")
    for name in ("threshold", "τ", "95 %", "accepted of verified", "drafts a round", "verify rate"):
        table.add_column(name, justify="right")
    for point in study.sweep:
        low, high = point.interval
        table.add_row(
            f"{point.threshold:g}",
            f"{point.accepted_length:.2f}",
            f"{low:.2f} – {high:.2f}",
            _number(point.acceptance),
            f"{point.draft_tokens_per_proposal:.2f}",
            f"{point.verify_rate:.3f}",
        )
    return table


def _throughput_table(study: Study) -> Table:
    num_drafts = len(study.temperatures)
    table = _table(
        "Tokens a second by concurrency: recorded rounds replayed with measured step times\n" + study.hardware
    )
    for name in ("requests", f"all {num_drafts}", "best fixed", "scheduled", "drafts", "to all", "to best fixed"):
        table.add_column(name, justify="right")
    for row in study.throughput:
        best = row.fixed[row.best_fixed]
        table.add_row(
            str(row.num_requests),
            f"{row.fixed[-1]:,.0f}",
            f"{best:,.0f} ({row.best_fixed})",
            f"{row.scheduled:,.0f}",
            f"{row.scheduled_drafts:.2f}",
            f"{row.scheduled / row.fixed[-1]:.2f}×",
            f"{row.scheduled / best:.2f}×",
        )
    return table


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left")


def _number(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.3f}"
