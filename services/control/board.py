"""The run's last word on itself, put together from its records: a sink of the driver's journal. Pure."""

from __future__ import annotations

from typing import Any

from services.contracts import Autoscaling, Event, TargetState
from services.control.records import EvaluationPoint, RunStatus
from services.running_means import RunningMeans

MOST_EVENTS = 20
"""Newest events that a status carries; the run's history has all of them."""

MOST_EVALUATIONS = 50

_FIGURES = (
    "phase",
    "tokens_captured",
    "tokens_trained",
    "capture_tokens_per_s",
    "resident_bytes",
    "peak_bytes",
    "capacity_bytes",
)


class StatusBoard:
    """Keeps a `RunStatus` up to date with the records of `services.telemetry`.

    Attributes:
        status: The run, as of the last record.
    """

    def __init__(self, status: RunStatus) -> None:
        self.status = status
        self._means = RunningMeans()

    def take(self, record: dict[str, Any]) -> None:
        """One record; kinds that say nothing about the run's state are passed over."""
        match record["kind"]:
            case "step":
                self._take_step(record)
            case "figures":
                targets = tuple(TargetState.model_validate(target) for target in record["targets"])
                own = record["autoscaling"]
                autoscaling = Autoscaling.model_validate(own) if own else None
                self.set(targets=targets, autoscaling=autoscaling, **{name: record[name] for name in _FIGURES})
            case "event":
                event = Event(time_s=record["time_s"], kind=record["event"], message=record["message"])
                self.set(events=(*self.status.events, event)[-MOST_EVENTS:])
            case "evaluation":
                low, high = record["interval"]
                point = EvaluationPoint(
                    label=record["label"],
                    step=record["step"],
                    accepted_length=record["accepted_length"],
                    interval=(low, high),
                )
                others = (other for other in self.status.evaluations if other.label != point.label)
                self.set(evaluations=(*others, point)[-MOST_EVALUATIONS:])

    def set(self, **changes: Any) -> None:
        """What the driver knows better than its records."""
        self.status = self.status.model_copy(update=changes)

    def close(self) -> None:
        """Nothing is held."""

    def _take_step(self, record: dict[str, Any]) -> None:
        self.set(
            step=record["step"],
            total_steps=record["total_steps"] or 0,
            metrics=self._means.add(record["metrics"]),
            learning_rate=record["learning_rate"],
            train_tokens_per_s=record["tokens_per_s"],
            trainer_wait_fraction=record["wait_fraction"],
        )
