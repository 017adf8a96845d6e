"""Selectors: which ready sample the next use comes from. The Lua scripts do the same; a draw in [0, 1) is passed in.

| selector | P(i) | for |
|---|---|---|
| fifo | 1 for the sample that was committed first; one with uses left goes to the end of the line | the plan's order |
| uniform | 1 / N | mixing: reuse that does not repeat the order of the captures |
| prioritized | wᵢ / Σ w with wᵢ = pᵢ^α | more of what the drafter still gets wrong |

A sample's priority pᵢ is its newest rejection: 1 − the mean acceptance of what was drafted for it. Drawing by priority
changes what the loss is a mean of; the importance (w_min / wᵢ)^β ≤ 1 multiplies the sample's loss and undoes that,
wholly with β = 1 (Prioritized Experience Replay, Schaul et al. 2016, §3.4: (N · P(i))^−β over its largest value).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

NEW_PRIORITY = 1.0
"""Priority of a sample that was not trained on yet: the highest there is, so that each is soon drawn once."""

LEAST_PRIORITY = 0.01
"""What a rejection below counts as: a sample that the drafter knows by heart must still be drawn now and then, or its
bytes would stay for ever."""


class SelectorKind(StrEnum):
    """How a table chooses."""

    FIFO = "fifo"
    UNIFORM = "uniform"
    PRIORITIZED = "prioritized"


@dataclass(frozen=True)
class Selector:
    """How a table chooses, and with which exponents.

    Attributes:
        kind: Which selector.
        priority_exponent: α of prioritized; 0 draws uniformly.
        importance_exponent: β of prioritized; 0 leaves losses as they are.
    """

    kind: SelectorKind = SelectorKind.FIFO
    priority_exponent: float = 0.6
    importance_exponent: float = 0.4

    def weight(self, priority: float) -> float:
        """w of a priority."""
        return math.pow(priority, self.priority_exponent)

    def choose(self, line: Sequence[Ready], draw: float) -> Choice:
        """Choose a sample.

        Args:
            line: Ready samples, those that fifo takes first in front; at least one.
            draw: In [0, 1).
        """
        if self.kind is SelectorKind.FIFO:
            return Choice(line[0].capture)
        if self.kind is SelectorKind.UNIFORM:
            return Choice(line[math.floor(draw * len(line))].capture)
        by_weight = sorted(line, key=lambda sample: (sample.weight, str(sample.capture)))
        total = 0.0
        for sample in by_weight:
            total += sample.weight
        passed = 0.0
        for chosen in by_weight:
            passed += chosen.weight
            if draw * total < passed:
                break
        return Choice(chosen.capture, math.pow(by_weight[0].weight / chosen.weight, self.importance_exponent))


class Ready(NamedTuple):
    """A sample that uses can be leased of."""

    capture: int
    weight: float


class Choice(NamedTuple):
    """A chosen sample, and what its loss is multiplied by."""

    capture: int
    importance: float = 1.0


def priorities(rejections: Mapping[int, float]) -> dict[int, float]:
    """Priorities of captures from how much of their drafts was rejected.

    Raises:
        ValueError: A rejection is no number in [0, 1].
    """
    for capture, rejection in rejections.items():
        if not 0 <= rejection <= 1:
            raise ValueError(f"rejection {rejection} of capture {capture} must be a number from 0 to 1")
    return {capture: max(rejection, LEAST_PRIORITY) for capture, rejection in rejections.items()}
