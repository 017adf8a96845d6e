"""What part of its last seconds the trainer waited for samples. Pure: the time is passed in.

Steps say how long they took and how much of that was waiting, but only once they are done, and a starving trainer is
hardly ever done. So the step under way counts too: whatever it takes beyond the longest time that a step has computed
lately, it waits.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

FEWEST_STEPS = 8
"""Steps that are remembered however long ago they were: what a step computes for is known from them."""


class StepTime(NamedTuple):
    """One optimizer step, on the clock of whoever passes the time in."""

    end_s: float
    step_s: float
    """How long it took, waiting included."""
    wait_s: float
    is_saved: bool = False
    """A checkpoint is written after it, for which the trainer neither computes nor waits."""

    @property
    def begin_s(self) -> float:
        """When it began."""
        return self.end_s - self.step_s

    @property
    def busy_s(self) -> float:
        """How long it computed."""
        return max(0.0, self.step_s - self.wait_s)


class Waited(NamedTuple):
    """The trainer's wait over some last seconds."""

    part: float
    """Of the time."""
    over_s: float
    """Trainer time that was looked at."""


class TrainerWait:
    """Remembers the steps of about one window.

    Args:
        window_s: Trainer time to judge by; less is not judged.
    """

    def __init__(self, window_s: float) -> None:
        self._window_s = window_s
        self._steps: deque[StepTime] = deque()
        self._step_s = 0.0

    def add(self, step: StepTime) -> None:
        """Take in a step that is done; steps come in order."""
        self._steps.append(step)
        self._step_s += step.step_s
        while len(self._steps) > FEWEST_STEPS and self._step_s - self._steps[0].step_s >= self._window_s:
            self._step_s -= self._steps.popleft().step_s

    def judge(self, now_s: float, since_s: float) -> Waited | None:
        """The wait over the last window, or over the last step if that was longer.

        Args:
            now_s: The time.
            since_s: Steps that began earlier say nothing about how things are now.

        Returns:
            None while less than a window of the time since then is known.
        """
        over_s, wait_s = self._under_way(now_s, since_s)
        for step in reversed(self._steps):
            if over_s >= self._window_s or step.begin_s < since_s:
                break
            over_s += step.step_s
            wait_s += step.wait_s
        if over_s < self._window_s:
            return None
        return Waited(min(1.0, wait_s / over_s), over_s)

    def _under_way(self, now_s: float, since_s: float) -> tuple[float, float]:
        """How long the step under way has taken and waited; zeros while it may still compute."""
        if not self._steps or self._steps[-1].end_s < since_s or self._steps[-1].is_saved:
            return 0.0, 0.0
        taken_s = now_s - self._steps[-1].end_s
        overdue_s = taken_s - max(step.busy_s for step in self._steps)
        return (taken_s, overdue_s) if overdue_s > 0 else (0.0, 0.0)
