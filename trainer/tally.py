"""Figures of one optimizer step, added up over micro-batches and ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from services.contracts import SampleLease


@dataclass(frozen=True)
class StepFigures:
    """One optimizer step, all ranks together.

    Attributes:
        metrics: Mean over the step's micro-batches, each weighted with its samples; no metric where there were none.
        num_samples: Samples trained.
        num_tokens: Tokens trained.
        wait_s: Seconds that the slowest rank waited for micro-batches.
        step_s: Seconds that the slowest rank took, waiting included.
    """

    metrics: dict[str, float]
    num_samples: int
    num_tokens: int
    wait_s: float
    step_s: float


class StepTally:
    """One rank's part of a step. Ranks combine theirs by adding their vectors element by element."""

    def __init__(self, rank: int, world_size: int) -> None:
        self._rank = rank
        self._world_size = world_size
        self._metrics: list[Mapping[str, float]] = []
        self._num_samples: list[int] = []
        self.uses: list[int] = []
        self.num_tokens = 0

    def add(self, metrics: Mapping[str, float], leases: Sequence[SampleLease], num_tokens: int) -> None:
        """Add one micro-batch; `metrics` are already those of all ranks."""
        self._metrics.append(metrics)
        self._num_samples.append(len(leases))
        self.uses += [lease.use for lease in leases]
        self.num_tokens += num_tokens

    def vector(self, *, wait_s: float, step_s: float) -> list[float]:
        """What is added over ranks: samples by micro-batch, tokens, then one place a rank for each of the times."""
        times = [0.0] * (2 * self._world_size)
        times[self._rank], times[self._world_size + self._rank] = wait_s, step_s
        return [*map(float, self._num_samples), float(self.num_tokens), *times]

    def figures(self, total: Sequence[float]) -> StepFigures:
        """The step's figures from the sum of all ranks' vectors."""
        num_micro_batches = len(self._metrics)
        samples = [round(count) for count in total[:num_micro_batches]]
        waits = total[num_micro_batches + 1 : num_micro_batches + 1 + self._world_size]
        return StepFigures(
            metrics=_weighted_mean(self._metrics, samples),
            num_samples=sum(samples),
            num_tokens=round(total[num_micro_batches]),
            wait_s=max(waits),
            step_s=max(total[num_micro_batches + 1 + self._world_size :]),
        )


def _weighted_mean(rows: Sequence[Mapping[str, float]], weights: Sequence[int]) -> dict[str, float]:
    counted = [(row, weight) for row, weight in zip(rows, weights, strict=True) if weight]
    if not counted:
        return {}
    total = sum(weight for _, weight in counted)
    return {name: math.fsum(row[name] * weight for row, weight in counted) / total for name in counted[0][0]}
