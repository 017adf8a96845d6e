"""The files that a comparison leaves beside its records: JSON, CSV, pictures and the report. No torch."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evaluation.compare.comparison import Comparison
from evaluation.compare.plots import draw_all
from evaluation.compare.report import REPORT, write_report
from evaluation.outputs import groups
from services.files import replace_text

COMPARISON_JSON = "comparison.json"
DRAFTERS_CSV = "drafters.csv"
DIFFERENCES_CSV = "differences.csv"

COLUMNS = (
    "drafter", "algorithm", "group", "name", "accepted_length", "interval_low", "interval_high", "published",
    "speedup", "draft_round_s", "draft_share", "draft_tokens_per_proposal", "verify_rate", "samples", "skipped",
    "rounds", "new_tokens", "differing",
)  # fmt: skip


def as_json(comparison: Comparison, folder: Path) -> dict[str, Any]:
    """What `slipstream compare --json` prints."""
    values = comparison.model_dump(mode="json", exclude={"standings", "differences", "domains"})
    drafters = {}
    for standing in comparison.standings:
        found = standing.model_dump(mode="json")
        label, results = found.pop("label"), found.pop("results")
        drafters[label] = found | results
    differences = [
        {name: getattr(entry, name) for name in ("first", "second", "kind", "name")}
        | (
            {"difference": None, "interval": None, "num_prompts": 0, "is_clear": False}
            if (paired := entry.paired) is None
            else {
                "difference": paired.difference,
                "interval": [paired.low, paired.high],
                "num_prompts": paired.num_prompts,
                "is_clear": paired.is_clear,
            }
        )
        for entry in comparison.differences
    ]
    return {
        **values,
        "output_dir": str(folder),
        "report": str(folder / REPORT),
        "drafters": drafters,
        "differences": differences,
    }


def write_outputs(comparison: Comparison, folder: Path) -> None:
    """Write all files; those of an earlier time are replaced."""
    replace_text(folder / COMPARISON_JSON, json.dumps(as_json(comparison, folder), indent=2) + "\n")
    replace_text(folder / DRAFTERS_CSV, drafters_csv(comparison))
    replace_text(folder / DIFFERENCES_CSV, differences_csv(comparison))
    draw_all(comparison, folder)
    write_report(comparison, folder)


def drafters_csv(comparison: Comparison) -> str:
    """A row for each drafter and group of samples; acceptance by position in columns of its own."""
    rates = ("accept_rate", "cond_accept_rate")
    most = max(len(standing.results.overall.accept_rate) for standing in comparison.standings)
    head = [*COLUMNS, *(f"{rate}@{k}" for rate in rates for k in range(most))]
    rows = []
    for standing in comparison.standings:
        for group, name, figures in groups(standing.results):
            low, high = figures.interval or (None, None)
            cost = standing.draft_cost[group][name]
            values = figures.model_dump() | {
                "drafter": standing.label,
                "algorithm": standing.algorithm,
                "group": group,
                "name": name,
                "interval_low": low,
                "interval_high": high,
                "draft_round_s": cost.round_s,
                "draft_share": cost.share,
            }
            row = [values[column] for column in COLUMNS]
            for rate in rates:
                row += [*values[rate], *[None] * (most - len(values[rate]))]
            rows.append(row)
    return _csv(head, rows)


def differences_csv(comparison: Comparison) -> str:
    """A row for each pair and group of samples."""
    head = ["first", "second", "group", "name", "difference", "low", "high", "num_prompts"]
    rows = [
        [
            entry.first, entry.second, entry.kind, entry.name,
            *((None, None, None, 0) if (found := entry.paired) is None
              else (found.difference, found.low, found.high, found.num_prompts)),
        ]
        for entry in comparison.differences
    ]  # fmt: skip
    return _csv(head, rows)


def _csv(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(["" if value is None else value for value in row] for row in rows)
    return text.getvalue()
