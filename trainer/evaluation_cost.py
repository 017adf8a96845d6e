"""What measuring checkpoints during training costs a step: step time meanwhile against step time otherwise. Pure."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from statistics import median
from typing import Any, NamedTuple

from services.contracts import Record

FEWEST_STEPS = 10
"""A median over fewer steps says nothing."""


class Span(NamedTuple):
    """From one wall-clock time to another."""

    begin_s: float
    end_s: float


class EvaluationCost(Record):
    """Step times of one attempt; the median, because single steps wait for the buffer or for a checkpoint."""

    num_measured: int
    """Checkpoints measured during training."""
    num_steps_during: int
    """Steps that began and ended while a checkpoint was measured."""
    num_steps_otherwise: int
    """Steps during which none was."""
    step_s_during: float | None
    step_s_otherwise: float | None
    """Medians; None where there are too few steps to say."""
    ratio: float | None
    """How many times longer a step takes meanwhile."""


def evaluation_cost(steps: Sequence[Span], evaluations: Iterable[Span]) -> EvaluationCost:
    """Compare steps within evaluations with steps outside; those in which one begins or ends count for neither.

    Args:
        steps: In the order of their time.
        evaluations: One after the other, in any order.
    """
    spans = sorted(evaluations)
    during: list[float] = []
    otherwise: list[float] = []
    for begin_s, end_s in steps:
        last = bisect_left(spans, (end_s,)) - 1  # the last that begins before the step ends
        if last < 0 or spans[last].end_s <= begin_s:
            otherwise.append(end_s - begin_s)
        elif spans[last].begin_s <= begin_s and end_s <= spans[last].end_s:
            during.append(end_s - begin_s)
    can_say = min(len(during), len(otherwise)) >= FEWEST_STEPS
    step_s_during, step_s_otherwise = (median(during), median(otherwise)) if can_say else (None, None)
    return EvaluationCost(
        num_measured=bisect_left(spans, (steps[-1].end_s,)) if steps else 0,
        num_steps_during=len(during),
        num_steps_otherwise=len(otherwise),
        step_s_during=step_s_during,
        step_s_otherwise=step_s_otherwise,
        ratio=step_s_during / step_s_otherwise if step_s_during and step_s_otherwise else None,
    )


class EvaluationCostMeter:
    """The sink that collects what `evaluation_cost` compares."""

    def __init__(self) -> None:
        self._steps: list[Span] = []
        self._evaluations: list[Span] = []

    def take(self, record: dict[str, Any]) -> None:
        """Note when a step, or an evaluation, began and ended."""
        match record["kind"]:
            case "step":
                self._steps.append(Span(record["time_s"] - record["step_s"], record["time_s"]))
            case "evaluation":
                self._evaluations.append(Span(record["began_s"], record["time_s"]))

    def close(self) -> None:
        """Nothing is held."""

    def cost(self) -> EvaluationCost:
        """The figures so far; the first step is left out, it waits for the buffer to fill."""
        return evaluation_cost(self._steps[1:], self._evaluations)
