"""A run made of numbers: targets fill a buffer, a trainer empties it, an autoscaler watches. Hours pass in a second."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from services.target.autoscaler import Autoscaler, Decision, Observation
from services.target.config import AutoscaleConfig
from services.target.trainer_wait import StepTime

TICK_S = 0.5
LOOK_TICKS = 2
"""A driver looks about once a second."""


@dataclass
class SimulatedTarget:
    """Attributes:
    serves_at_s: When it has loaded; infinite while the cluster has no place for it.
    """

    serves_at_s: float
    is_failed: bool = False


@dataclass
class SimulatedRun:
    """One run.

    Attributes:
        trainer_rate: Samples a second that the trainer could consume at a time.
        target_rate: Samples a second of one target.
        load_s: How long a target loads.
        capacity: Samples that the buffer holds.
        step_samples: Samples of an optimizer step.
        noise: Of both rates, by tick: the standard deviation of their logarithm.
        burst_s: Targets give what they have computed once in so many seconds; 0 gives it at once.
        places: Targets that the cluster has room for.
        is_broken: Whether a target that is asked for at a time fails to load.
    """

    config: AutoscaleConfig
    trainer_rate: Callable[[float], float]
    target_rate: float = 10.0
    replicas: int = 1
    load_s: float = 120.0
    capacity: float = 400.0
    step_samples: int = 50
    noise: float = 0.2
    burst_s: float = 0.0
    places: int = 1000
    is_broken: Callable[[float], bool] = lambda now_s: False
    seed: int = 0
    now_s: float = 0.0
    is_paused: bool = False
    left_s: float | None = None
    decisions: list[tuple[float, Decision]] = field(default_factory=list)
    numbers: list[tuple[float, int]] = field(default_factory=list)
    """(time, targets that serve), by look."""

    def __post_init__(self) -> None:
        self.autoscaler = Autoscaler(self.config)
        self.targets = [SimulatedTarget(0.0) for _ in range(self.replicas)]
        self._random = random.Random(self.seed)
        self._level = self._computed = 0.0
        self._step_left = float(self.step_samples)
        self._step_s = self._step_wait_s = 0.0
        self._steps: list[StepTime] = []
        self._waits: list[tuple[float, float]] = []
        self._num_ticks = 0
        self._is_held_back = False

    def run(self, until_s: float) -> None:
        """Let time pass."""
        while self.now_s < until_s:
            self._tick()
            if self._num_ticks % LOOK_TICKS == 0:
                self._look()

    def kill(self, index: int = 0) -> None:
        """A target loses its process and loads again."""
        self.targets[index].serves_at_s = self.now_s + self.load_s

    def scale(self, targets: int) -> None:
        """What `TargetPool.scale` does."""
        self.targets = [target for target in self.targets if not target.is_failed]
        self.targets.sort(key=lambda target: target.serves_at_s)
        del self.targets[targets:]
        while len(self.targets) < targets:
            is_placed = len(self.targets) < self.places
            serves_at_s = self.now_s + self._random.uniform(0.8, 1.2) * self.load_s if is_placed else math.inf
            self.targets.append(SimulatedTarget(serves_at_s, self.is_broken(self.now_s)))

    @property
    def num_serving(self) -> int:
        return sum(target.serves_at_s <= self.now_s and not target.is_failed for target in self.targets)

    def waited(self, from_s: float, to_s: float = math.inf) -> float:
        """Part of its time that the trainer really waited."""
        waits = [wait for time_s, wait in self._waits if from_s <= time_s < to_s]
        return sum(waits) / (len(waits) * TICK_S)

    def scalings(self, from_s: float = 0.0, to_s: float = math.inf) -> list[int]:
        """Numbers that were decided on."""
        return [
            decision.targets
            for time_s, decision in self.decisions
            if from_s <= time_s < to_s and decision.targets is not None
        ]

    def notices(self) -> list[str]:
        """Reasons of decisions that change nothing."""
        return [decision.reason for _, decision in self.decisions if decision.targets is None]

    def _tick(self) -> None:
        self.now_s += TICK_S
        self._num_ticks += 1
        self._computed += self.num_serving * self.target_rate * TICK_S * self._noise()
        if not self.burst_s or self._num_ticks % max(1, round(self.burst_s / TICK_S)) == 0:
            self._is_held_back |= self._level + self._computed >= self.capacity
            self._level = min(self.capacity, self._level + self._computed)
            self._computed = 0.0
        if not self.is_paused:
            self._train()

    def _train(self) -> None:
        wanted = self.trainer_rate(self.now_s) * TICK_S * self._noise()
        got = min(wanted, self._level)
        self._level -= got
        wait_s = TICK_S * (1 - got / wanted)
        self._waits.append((self.now_s, wait_s))
        self._step_s += TICK_S
        self._step_wait_s += wait_s
        self._step_left -= got
        if self._step_left <= 0:
            self._steps.append(StepTime(self.now_s, self._step_s, self._step_wait_s))
            self._step_left, self._step_s, self._step_wait_s = self._step_left + self.step_samples, 0.0, 0.0

    def _look(self) -> None:
        starting = [
            target for target in self.targets if self.now_s < target.serves_at_s < math.inf and not target.is_failed
        ]
        num_blocked = sum(target.serves_at_s == math.inf for target in self.targets)
        steps, self._steps = self._steps, []
        is_held_back, self._is_held_back = self._is_held_back, False
        decision = self.autoscaler.observe(
            Observation(
                time_s=self.now_s,
                steps=steps,
                ready_fill=self._level / self.capacity,
                is_held_back=is_held_back,
                num_wanted=len(self.targets),
                num_serving=self.num_serving,
                num_starting=len(starting),
                blocked=f"{num_blocked} targets wait for a GPU" if num_blocked else "",
                is_steady=not self.is_paused,
                left_s=self.left_s,
            )
        )
        self.numbers.append((self.now_s, self.num_serving))
        if decision is None:
            return
        self.decisions.append((self.now_s, decision))
        if decision.targets is not None:
            self.scale(decision.targets)

    def _noise(self) -> float:
        return self._random.lognormvariate(0.0, self.noise)
