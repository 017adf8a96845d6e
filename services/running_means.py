"""Running means of what each optimizer step measures, for eyes; the history keeps each step's own."""

from __future__ import annotations

from collections.abc import Mapping

SMOOTHING_STEPS = 20
"""The means are over about so many steps."""


class RunningMeans:
    """Exponential running means by name; while there are few steps, plain means."""

    def __init__(self) -> None:
        self._num_steps = 0
        self._means: dict[str, float] = {}

    def add(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Take in a step's metrics; the means of those that it has."""
        self._num_steps += 1
        weight = 1 / min(self._num_steps, SMOOTHING_STEPS)
        self._means = {
            name: (1 - weight) * self._means.get(name, value) + weight * value for name, value in metrics.items()
        }
        return dict(self._means)
