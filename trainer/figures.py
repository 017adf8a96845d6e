"""What training counts: one optimizer step over micro-batches and ranks, then an attempt over its steps. No torch."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from services.contracts import Record, SampleLease

FINAL_LOSS_STEPS = 10
"""The final loss is the mean over this many last steps: one step's loss is mostly noise."""


class TrainResult(Record):
    """What a trainer rank ends with; the same on every rank."""

    first_step: int
    """First optimizer step of this attempt, counted from 1 over the whole run."""
    steps: int
    """Optimizer steps done in all, those of earlier attempts included."""
    final_loss: float | None
    """Mean loss of the run's last steps, those of earlier attempts included; None where there were none."""
    tokens: int
    """Tokens trained on in this attempt, all ranks together."""
    first_fill_s: float
    """Seconds that the first step of this attempt waited for the buffer to fill."""
    wait_fraction: float | None
    """Part of this attempt's time after its first step, checkpoints left out, that was spent waiting for micro-batches;
    the slowest rank of each step counts. None where there was one step or none."""


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
    """One rank's part of a step. Ranks combine theirs by adding their vectors element by element.

    A metric of the step is the mean over micro-batches and ranks, each weighted with its samples.
    """

    def __init__(self, rank: int, world_size: int) -> None:
        self._rank = rank
        self._world_size = world_size
        self._metrics: list[Mapping[str, float]] = []
        self._num_samples: list[int] = []
        self.uses: list[int] = []
        self.num_tokens = 0

    def add(self, metrics: Mapping[str, float], leases: Sequence[SampleLease], num_tokens: int) -> None:
        """Add one micro-batch; `metrics` are those of all ranks that share its loss."""
        self._metrics.append(metrics)
        self._num_samples.append(len(leases))
        self.uses += [lease.use for lease in leases]
        self.num_tokens += num_tokens

    def vector(self, *, wait_s: float, step_s: float) -> list[float]:
        """What is added over ranks: samples, tokens, one place a rank for each of the times, then a sum a metric."""
        times = [0.0] * (2 * self._world_size)
        times[self._rank], times[self._world_size + self._rank] = wait_s, step_s
        counted = [(row, count) for row, count in zip(self._metrics, self._num_samples, strict=True) if count]
        sums = [math.fsum(row[name] * count for row, count in counted) for name in self._metrics[0]]
        return [float(sum(self._num_samples)), float(self.num_tokens), *times, *sums]

    def figures(self, total: Sequence[float]) -> StepFigures:
        """The step's figures from the sum of all ranks' vectors."""
        num_samples, num_tokens = round(total[0]), round(total[1])
        times, sums = total[2 : 2 + 2 * self._world_size], total[2 + 2 * self._world_size :]
        means = {name: value / max(1, num_samples) for name, value in zip(self._metrics[0], sums, strict=True)}
        return StepFigures(
            metrics=means if num_samples else {},
            num_samples=num_samples,
            num_tokens=num_tokens,
            wait_s=max(times[: self._world_size]),
            step_s=max(times[self._world_size :]),
        )


class RunFigures:
    """What an attempt adds up to. The first step's wait is kept apart: it waits for the buffer to fill.

    Args:
        last_losses: The newest losses of the attempt before, oldest first.
    """

    def __init__(self, last_losses: Iterable[float] = ()) -> None:
        self._num_steps = 0
        self._tokens = 0
        self._first_fill_s = 0.0
        self._wait_s = 0.0
        self._step_s = 0.0
        self._last_losses = deque(last_losses, maxlen=FINAL_LOSS_STEPS)

    def add(self, figures: StepFigures) -> None:
        """Add one step."""
        self._num_steps += 1
        self._tokens += figures.num_tokens
        if "loss" in figures.metrics:
            self._last_losses.append(figures.metrics["loss"])
        if self._num_steps == 1:
            self._first_fill_s = figures.wait_s
            return
        self._wait_s += figures.wait_s
        self._step_s += figures.step_s

    @property
    def last_losses(self) -> list[float]:
        """What the final loss is the mean of; saved with each checkpoint."""
        return list(self._last_losses)

    @property
    def wait_fraction(self) -> float | None:
        """Part of the time after the first step that was spent waiting; None before there is any."""
        return self._wait_s / self._step_s if self._step_s > 0 else None

    def result(self, *, steps: int) -> TrainResult:
        """The figures as a record, after `steps` optimizer steps of the whole run."""
        losses = self._last_losses
        return TrainResult(
            first_step=steps - self._num_steps + 1,
            steps=steps,
            final_loss=sum(losses) / len(losses) if losses else None,
            tokens=self._tokens,
            first_fill_s=self._first_fill_s,
            wait_fraction=self.wait_fraction,
        )
