"""The files that an evaluation leaves: JSON, CSV and TensorBoard. No torch."""

from __future__ import annotations

import csv
import io
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from evaluation.results import Figures, Results
from evaluation.session import Session
from evaluation.timing import PHASES
from services.files import replace_text

RESULTS_JSON = "results.json"
RESULTS_CSV = "results.csv"
TENSORBOARD = "tensorboard"

COLUMNS = (
    "group", "name", "accepted_length", "interval_low", "interval_high", "published", "speedup",
    "draft_tokens_per_proposal", "verify_rate", "samples", "skipped", "rounds", "new_tokens", "differing",
    *PHASES, "plain_s",
)  # fmt: skip


def as_json(session: Session, results: Results, warnings: Sequence[str], folder: Path) -> dict[str, Any]:
    """What `slipstream eval --json` prints."""
    return {
        "target": session.settings.target,
        "drafter": session.settings.drafter,
        "algorithm": session.algorithm,
        "output_dir": str(folder),
        **results.model_dump(mode="json"),
        "warnings": list(warnings),
        "settings": session.identity,
    }


def write_outputs(session: Session, results: Results, warnings: Sequence[str], folder: Path) -> None:
    """Write all files; those of an earlier time are replaced."""
    text = json.dumps(as_json(session, results, warnings, folder), indent=2)
    replace_text(folder / RESULTS_JSON, text + "\n")
    replace_text(folder / RESULTS_CSV, as_csv(results))
    _write_tensorboard(folder / TENSORBOARD, results)


def as_csv(results: Results) -> str:
    """A row for each task and domain, and one for all; acceptance by position in columns of its own."""
    most = max(len(figures.accept_rate) for _, _, figures in groups(results))
    rates = ("accept_rate", "cond_accept_rate")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*COLUMNS, *(f"{rate}@{k}" for rate in rates for k in range(most))])
    for group, name, figures in groups(results):
        low, high = figures.interval or (None, None)
        values = figures.model_dump() | {"group": group, "name": name, "interval_low": low, "interval_high": high}
        values |= _seconds(figures)
        row = [values[column] for column in COLUMNS]
        for rate in rates:
            row += [*values[rate], *[None] * (most - len(values[rate]))]
        writer.writerow("" if value is None else value for value in row)
    return text.getvalue()


def groups(results: Results) -> Iterator[tuple[str, str, Figures]]:
    """Kind, name and figures of every group of samples."""
    for name, figures in results.tasks.items():
        yield "task", name, figures
    for name, figures in results.domains.items():
        yield "domain", name, figures
    yield "all", "all", results.overall


def scalars(results: Results) -> Iterator[tuple[str, int, float]]:
    """Tag, step and value of each figure; acceptance is a curve over positions in the draft, counted from 0."""
    for group, name, figures in groups(results):
        place = "all" if group == "all" else f"{group}/{name}"
        single = {
            "accepted_length": figures.accepted_length,
            "accepted_length_low": figures.interval and figures.interval[0],
            "accepted_length_high": figures.interval and figures.interval[1],
            "speedup": figures.speedup,
            "verify_rate": figures.verify_rate,
            "draft_tokens_per_proposal": figures.draft_tokens_per_proposal,
        }
        single |= _seconds(figures)
        yield from ((f"{place}/{tag}", 0, value) for tag, value in single.items() if value is not None)
        for tag in ("accept_rate", "cond_accept_rate"):
            rates = getattr(figures, tag)
            yield from ((f"{place}/{tag}", k, rate) for k, rate in enumerate(rates) if rate is not None)


def _seconds(figures: Figures) -> dict[str, float | None]:
    """Where the time of speculative decoding went, and what plain decoding took."""
    phases = {name: getattr(figures.speculative, name) for name in PHASES}
    return phases | {"plain_s": figures.plain and figures.plain.total_s}


def _write_tensorboard(folder: Path, results: Results) -> None:
    # Quick to import; still only whoever evaluates pays for it.
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    shutil.rmtree(folder, ignore_errors=True)
    writer = EventFileWriter(str(folder))
    for tag, step, value in scalars(results):
        summary = Summary(value=[Summary.Value(tag=tag, simple_value=value)])
        writer.add_event(Event(wall_time=time.time(), step=step, summary=summary))
    writer.close()
