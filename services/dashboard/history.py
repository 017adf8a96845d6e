"""What a run's records add up to: its series over steps and time, what was decoded, what happened, how it stands.

Pure: records go in one by one with their place in the file, and come out as columns. A resumed run appends to the file
of the attempt before; steps after the checkpoint it resumed from are trained again, and the newest attempt counts.
"""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left, bisect_right
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from services.dashboard.decimation import kept_rows
from services.dashboard.shapes import is_known, read_record
from services.running_means import SMOOTHING_STEPS

Axis = Literal["step", "elapsed_s"]

MOST_EVENTS = 500
"""Events kept; a run that restarts a target every minute has so many in eight hours."""

NUM_BUCKETS = 250
"""Of a decimated series: a chart is about 500 pixels wide."""

SMALLEST = 1e-300
"""What is nearer to 0 is 0: its digits would need a scale that no float holds."""

MOST_LIVE_ROWS = 2_000
"""A reader that missed more rows than this is better off with a new, decimated history."""


STEERING: dict[str, Literal["paused", "stopping"] | None] = {"pause": "paused", "continue": None, "stop": "stopping"}
"""What the driver's events of these kinds mean."""


class Table:
    """Columns over the same rows, each row with its step, time and place in the file."""

    def __init__(self) -> None:
        self.step = array("d")
        self.elapsed_s = array("d")
        self.offset = array("q")
        self.columns: dict[str, array[float]] = {}

    def __len__(self) -> int:
        return len(self.step)

    def append(self, offset: int, step: float, elapsed_s: float, values: dict[str, float]) -> None:
        """Add a row; a column that it lacks, or that earlier rows lacked, is NaN there."""
        for name in values.keys() - self.columns.keys():
            self.columns[name] = array("d", [math.nan]) * len(self)
        self.step.append(step)
        self.elapsed_s.append(elapsed_s)
        self.offset.append(offset)
        for name, column in self.columns.items():
            column.append(values.get(name, math.nan))

    def drop_from(self, row: int) -> None:
        """Forget this row and all later ones."""
        del self.offset[row:]
        for column in (self.step, self.elapsed_s, *self.columns.values()):
            del column[row:]

    def last(self, name: str) -> float | None:
        """The newest value of a column; None where there is none, or it is no number."""
        column = self.columns.get(name)
        return column[-1] if column and math.isfinite(column[-1]) else None

    def smoothed(self, name: str, value: float) -> float:
        """The next value of a running mean that is kept in a column, over as many steps as the terminal's."""
        before = self.last(name)
        return value if before is None else before + (value - before) / min(len(self) + 1, SMOOTHING_STEPS)


class History:
    """A run as its records tell it.

    Attributes:
        run: The newest `run` record, if there is one.
        figures: The newest `figures` record.
        steered: What somebody has asked of the newest attempt, if that still holds.
        end: The `end` record of the newest attempt, unless it is still under way.
        events: What happened, oldest first, with `offset`, `step` and `elapsed_s`.
        evaluations: Decoded τ by step, with the same.
        steps, seconds: The series: one row an optimizer step, one row about every second.
        total_steps: Of the run, once known.
        last_time_s: Wall clock of the newest record; None before the first.
        offset: Place in the file up to which records were taken in.
        num_unreadable: Records of known kinds that do not hold what theirs must.
        cut_offset: Where rows were last dropped: who has read less must read everything again.
    """

    def __init__(self) -> None:
        self.run: dict[str, Any] | None = None
        self.figures: dict[str, Any] | None = None
        self.end: dict[str, Any] | None = None
        self.steered: Literal["paused", "stopping"] | None = None
        self.events: list[dict[str, Any]] = []
        self.evaluations: list[dict[str, Any]] = []
        self.steps = Table()
        self.seconds = Table()
        self.total_steps: int | None = None
        self.last_time_s: float | None = None
        self.offset = 0
        self.cut_offset = 0
        self.num_unreadable = 0
        self._clock_zero_s: float | None = None
        self._attempt_first_row = 0

    def take(self, offset: int, record: dict[str, Any]) -> None:
        """Take in one record; `offset` is the place in the file behind it. Unknown kinds are left out.

        So are records that lack something or hold what cannot be; `num_unreadable` counts them.
        """
        self.offset = offset
        if not is_known(record.get("kind")):
            return
        readable = read_record(record)
        if readable is None:
            self.num_unreadable += 1
            return
        record, take = readable, getattr(self, f"_take_{readable['kind']}")
        self.last_time_s = record["time_s"]
        if self._clock_zero_s is None:
            self._clock_zero_s = record["time_s"]
        take(offset, record)

    @property
    def num_steps(self) -> int:
        """The newest optimizer step."""
        return int(self.steps.step[-1]) if len(self.steps) else 0

    @property
    def elapsed_s(self) -> float:
        """Time that the run has taken so far, what lay between its attempts left out."""
        return max((table.elapsed_s[-1] for table in (self.steps, self.seconds) if len(table)), default=0.0)

    def steps_per_s(self, num_rows: int = 100) -> float | None:
        """How fast this attempt trains, over its newest steps; None before its second."""
        first = max(self._attempt_first_row, len(self.steps) - num_rows)
        if len(self.steps) - first < 2:
            return None
        took_s = self.steps.elapsed_s[-1] - self.steps.elapsed_s[first]
        return (self.steps.step[-1] - self.steps.step[first]) / took_s if took_s > 0 else None

    def series(
        self, axis: Axis = "step", low: float = -math.inf, high: float = math.inf, num_buckets: int = NUM_BUCKETS
    ) -> dict[str, dict[str, list[float]]]:
        """Every series between two places on an axis, decimated; real values, the extremes among them.

        Returns:
            `step`, `elapsed_s` and `value` by name; rows without a number are left out.
        """
        return {
            name: _decimated(table, name, bisect_left(where, low), bisect_right(where, high), num_buckets)
            for table in (self.steps, self.seconds)
            for where in [table.step if axis == "step" else table.elapsed_s]
            for name in table.columns
        }

    def since(self, offset: int) -> dict[str, Any] | None:
        """What came behind a place in the file; None where a reader must read everything again.

        Returns:
            `series` as above but undecimated, `events`, `evaluations`.
        """
        first = {table: bisect_right(table.offset, offset) for table in (self.steps, self.seconds)}
        num_rows = sum(len(table) - row for table, row in first.items())
        if offset < self.cut_offset or offset > self.offset or num_rows > MOST_LIVE_ROWS:
            return None
        return {
            "series": {
                name: _rows(table, name, np.arange(row, len(table)))
                for table, row in first.items()
                if row < len(table)
                for name in table.columns
            },
            "events": [event for event in self.events if event["offset"] > offset],
            "evaluations": [found for found in self.evaluations if found["offset"] > offset],
        }

    def _take_run(self, offset: int, record: dict[str, Any]) -> None:
        self.run, self.end, self.figures, self.steered = record, None, None, None
        self.total_steps = record.get("total_steps") or self.total_steps
        if record.get("attempt", 1) > 1:
            resumed = record.get("resumed_from_step") or 0
            self._forget_after(resumed, offset)
            self._clock_zero_s = record["time_s"] - self.elapsed_s
            text = f"attempt {record['attempt']}: goes on from step {resumed}"
            self._add_event(offset, record["time_s"], "resume", text)
        self._attempt_first_row = len(self.steps)

    def _take_step(self, offset: int, record: dict[str, Any]) -> None:
        if record["step"] <= self.num_steps:  # another attempt, of which no `run` record tells
            self._forget_after(record["step"] - 1, offset)
            self._attempt_first_row = len(self.steps)
        self.total_steps = record["total_steps"]
        metrics, table = record["metrics"], self.steps
        values = {"learning_rate": record["learning_rate"]}
        smoothed = {
            "train_tokens_per_s": record["tokens_per_s"],
            "wait": record["wait_s"] / record["step_s"] if record["step_s"] > 0 else 0.0,
        }
        if "loss" in metrics:
            values["loss"] = smoothed["loss_smooth"] = metrics["loss"]
        if "tau_probabilistic" in metrics:
            values["expected"] = smoothed["expected_smooth"] = metrics["tau_probabilistic"]
        smoothed |= {name: value for name, value in metrics.items() if name.startswith("accept_rate@")}
        for name, value in smoothed.items():
            values[name] = table.smoothed(name, value)
        table.append(offset, record["step"], self._elapsed_s(record["time_s"]), values)

    def _take_figures(self, offset: int, record: dict[str, Any]) -> None:
        self.figures = record
        table = self.seconds
        values = {
            "resident_bytes": record["resident_bytes"],
            "capacity_bytes": record["capacity_bytes"],
            "capture_tokens_per_s": record["capture_tokens_per_s"],
        }
        table.append(offset, record.get("step", self.num_steps), self._elapsed_s(record["time_s"]), values)

    def _take_event(self, offset: int, record: dict[str, Any]) -> None:
        self._add_event(offset, record["time_s"], record["event"], record["message"])
        if record["event"] in STEERING:
            self.steered = STEERING[record["event"]]

    def _take_evaluation(self, offset: int, record: dict[str, Any]) -> None:
        found = {key: value for key, value in record.items() if key != "kind"}
        found |= {"offset": offset, "elapsed_s": self._step_time_s(record["step"])}
        kept = [other for other in self.evaluations if other["step"] != found["step"]]
        self.evaluations = sorted([*kept, found], key=lambda found: found["step"])

    def _take_end(self, offset: int, record: dict[str, Any]) -> None:
        self.end = record
        self._add_event(offset, record["time_s"], record["outcome"], record["message"])

    def _add_event(self, offset: int, time_s: float, kind: str, message: str) -> None:
        event = {"time_s": time_s, "event": kind, "message": message, "offset": offset}
        self.events.append(event | {"step": self.num_steps, "elapsed_s": self._elapsed_s(time_s)})
        del self.events[:-MOST_EVENTS]

    def _elapsed_s(self, time_s: float) -> float:
        return max(0.0, time_s - self._clock_zero_s) if self._clock_zero_s is not None else 0.0

    def _step_time_s(self, step: int) -> float:
        """When a step was done: that is what an evaluation of its checkpoint belongs to."""
        row = bisect_right(self.steps.step, step) - 1
        return self.steps.elapsed_s[row] if row >= 0 else 0.0

    def _forget_after(self, step: int, offset: int) -> None:
        """Drop what an earlier attempt did after the checkpoint that was resumed from."""
        for table in (self.steps, self.seconds):
            row = bisect_right(table.step, step)
            if row < len(table):
                table.drop_from(row)
                self.cut_offset = offset
        self.evaluations = [found for found in self.evaluations if found["step"] <= step]


def _decimated(table: Table, name: str, first: int, end: int, num_buckets: int) -> dict[str, list[float]]:
    values = np.frombuffer(table.columns[name])[first:end]
    rows = np.flatnonzero(np.isfinite(values))
    return _rows(table, name, first + rows[kept_rows(values[rows], num_buckets)])


def _rows(table: Table, name: str, rows: npt.NDArray[np.intp]) -> dict[str, list[float]]:
    values = np.frombuffer(table.columns[name])[rows]
    rows = rows[np.isfinite(values)]
    return {
        "step": np.frombuffer(table.step)[rows].astype(int).tolist(),
        "elapsed_s": np.frombuffer(table.elapsed_s)[rows].round(2).tolist(),
        "value": _short(values[np.isfinite(values)]),
    }


def _short(values: npt.NDArray[np.float64]) -> list[float]:
    """Six significant digits: more than a chart shows, and a third of the bytes."""
    values = np.where(np.abs(values) < SMALLEST, 0.0, values)
    largest = np.where(values == 0, 1.0, np.abs(values))
    scale = 10.0 ** (5 - np.floor(np.log10(largest)))
    rounded: list[float] = (np.round(values * scale) / scale).tolist()
    return rounded
