"""How many targets a run needs, from what its trainer waits and its buffer holds. Pure: no clock, no Ray.

With n targets serving, a trainer that waits for the part w of its time could consume 1/(1 − w) times what they give:

    up      wait ≥ wait_high  and  samples ready for the trainer ≤ fill_low of the buffer
            → min(⌈n / (1 − w)⌉, 2n, max)
    down    wait ≤ wait_low   and  captures are held back, for down_cooldown_s without a break
            → max(n − max(1, ⌊n / 4⌋), min)

In between nothing changes. What was measured with another number of targets, during a pause, or while some part of the
run was brought back counts for nothing; nor is anything asked for while targets still load. What has lately turned out
to be too few is not tried again before `RETRY_COOLDOWNS` down_cooldown_s have passed, twice as many each time: a load
between two numbers does not make targets come and go.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from services.target.config import AutoscaleConfig
from services.target.trainer_wait import StepTime, TrainerWait, Waited

MOST_GROWTH = 2
"""One decision at most multiplies the targets by this: a measured wait of nearly 1 says "many", not how many."""

DOWN_DIVISOR = 4
"""One decision gives up at most one target in so many (at least one): too many cost money, too few stop the run."""

HELD_BACK_PART = 0.5
"""Targets are held back if the next capture waited in this part of the looks: a full buffer admits one now and then."""

RETRY_COOLDOWNS = 6
MOST_RETRY_COOLDOWNS = 24
"""How many down_cooldown_s pass before a number of targets that was too few is tried again, at first and at most."""

MOST_FRUITLESS_DOUBLINGS = 5
"""up_cooldown_s doubles with every request that came to nothing, so often: targets that fail to load, or that do not
help because something else is too slow, are not asked for every minute."""

LEAST_GAIN = 0.5
"""More targets have helped if the trainer computes for so much of the time that they could have saved it."""

LOAD_PATIENCE_S = 1200.0
"""A target that is not up by then is counted out; the largest models load within it."""


@dataclass(frozen=True)
class Observation:
    """The run at one moment, and what its trainer has done since the last one.

    Attributes:
        time_s: When; any clock that does not jump.
        steps: Optimizer steps that ended since the last observation.
        ready_fill: Part of the buffer's capacity that holds samples which the trainer could take now.
        is_held_back: The next capture waits for space, or for the rate limiter.
        num_wanted: Targets there shall be; those that load, wait for a resource or have failed are among them.
        num_serving: Targets that answer.
        num_starting: Targets that load, or are restarted.
        blocked: Which targets wait for what the cluster lacks; empty if none does.
        is_steady: The run trains, and no part was lost since the last observation: not paused, stopping or measuring.
        has_captures_to_come: The plan still has captures to make.
        left_s: How long the run goes on at its pace; None while that is not known.
    """

    time_s: float
    steps: Sequence[StepTime]
    ready_fill: float
    is_held_back: bool
    num_wanted: int
    num_serving: int
    num_starting: int
    blocked: str = ""
    is_steady: bool = True
    has_captures_to_come: bool = True
    left_s: float | None = None


@dataclass(frozen=True)
class Decision:
    """What to do.

    Attributes:
        targets: How many there shall be; None leaves them as they are and only says why no more are asked for.
        reason: Why, for people.
    """

    targets: int | None
    reason: str


class Autoscaler:
    """Decides over one run; feed it about once a second.

    Args:
        config: Bounds and thresholds.
    """

    def __init__(self, config: AutoscaleConfig) -> None:
        self._config = config
        self._wait = TrainerWait(config.window_s)
        self._looks: deque[tuple[float, float, bool]] = deque()
        """(time, ready fill, whether captures are held back) of the last window."""
        self._since_s = -math.inf
        """What was measured before says nothing about how things are now."""
        self._skips_step = True
        """The next step waits for the buffer to fill: it is the first one after a start."""
        self._num_serving = 0
        self._changed_s = -math.inf
        """When a number of targets was last asked for."""
        self._surplus_since_s: float | None = None
        self._asked: tuple[int, float] | None = None
        """Targets that served, and the trainer's wait, when more were asked for; None once known whether it helped."""
        self._num_fruitless = 0
        self._starting_since_s: float | None = None
        self._load_s = 0.0
        """The longest that targets which were asked for took until all of them served."""
        self._too_few: _TooFew = _TooFew(config.down_cooldown_s)
        self._said: str | None = None
        """Which limit was last named; none is named twice in a row."""

    def observe(self, seen: Observation) -> Decision | None:
        """Take in how the run is.

        Returns:
            What to do about it; None if nothing.
        """
        self._take(seen)
        if not (seen.is_steady and seen.has_captures_to_come):
            return None
        config = self._config
        if not config.min <= seen.num_wanted <= config.max:
            targets = min(max(seen.num_wanted, config.min), config.max)
            return self._decide(seen, targets, f"autoscaling keeps them between {config.min} and {config.max}")
        if self._awaits_targets(seen):
            return None
        waited = self._wait.judge(seen.time_s, self._since_s)
        if waited is None or not seen.num_serving:
            return None
        self._note_gain(seen, waited)
        if waited.part >= config.wait_high and self._ready_fill <= config.fill_low:
            self._surplus_since_s = None
            return self._grow(seen, waited)
        if waited.part <= config.wait_low and self._is_held_back:
            self._said = None
            return self._shrink(seen, waited)
        self._surplus_since_s = None
        return None

    def forget(self, now_s: float) -> None:
        """Judge only by what comes from now on; whoever scales by hand has reasons of their own."""
        self._settle(now_s)
        self._changed_s = now_s
        self._asked = self._starting_since_s = self._said = None
        self._num_fruitless = 0
        self._too_few.forget()

    def _take(self, seen: Observation) -> None:
        for step in seen.steps:
            if self._skips_step:
                self._skips_step = False
            else:
                self._wait.add(step)
        if not seen.is_steady:
            self._skips_step = True
        if not seen.is_steady or seen.num_serving != self._num_serving:
            self._settle(seen.time_s)
        self._num_serving = seen.num_serving
        self._looks.append((seen.time_s, seen.ready_fill, seen.is_held_back))
        while self._looks[0][0] < seen.time_s - self._config.window_s:
            self._looks.popleft()
        if self._said == "blocked" and not seen.blocked:
            self._said = None

    def _settle(self, now_s: float) -> None:
        self._since_s = now_s
        self._looks.clear()
        self._surplus_since_s = None

    def _awaits_targets(self, seen: Observation) -> bool:
        """Whether targets that were asked for, or lost their process, will serve before long."""
        if not seen.num_starting:
            self._starting_since_s = None
            return False
        if self._starting_since_s is None:
            self._starting_since_s = seen.time_s
        return seen.time_s - self._starting_since_s < LOAD_PATIENCE_S

    def _note_gain(self, seen: Observation, waited: Waited) -> None:
        """Whether the targets that were asked for last have come, and help."""
        if waited.part <= self._config.wait_low:
            self._num_fruitless = 0
        if self._asked is None:
            return
        (before, part), self._asked = self._asked, None
        if seen.num_serving > before:
            self._load_s = max(self._load_s, self._since_s - self._changed_s)
        hoped = 1 + LEAST_GAIN * (seen.num_serving / before - 1)
        has_helped = seen.num_serving > before and 1 - waited.part >= hoped * (1 - part)
        self._num_fruitless = 0 if has_helped else min(self._num_fruitless + 1, MOST_FRUITLESS_DOUBLINGS)

    def _grow(self, seen: Observation, waited: Waited) -> Decision | None:
        config, serving = self._config, seen.num_serving
        if seen.time_s - self._changed_s < config.up_cooldown_s * 2**self._num_fruitless:
            return None
        if seen.left_s is not None and seen.left_s < 2 * self._load_s:
            return None  # they would hardly serve before the run ends
        why = f"the trainer waited {_waited(waited)} and {_percent(self._ready_fill)} of the buffer held samples for it"
        if seen.blocked:
            return self._say("blocked", f"{why}, but no more targets are asked for while {seen.blocked}")
        most = MOST_GROWTH * serving
        needed = most if waited.part >= 1 - 1 / MOST_GROWTH else math.ceil(serving / (1 - waited.part))
        targets = min(max(needed, serving + 1), most, config.max)
        num_failed = seen.num_wanted - serving - seen.num_starting
        if targets <= seen.num_wanted and not num_failed:  # some have been loading for ever
            targets = min(seen.num_wanted + 1, config.max)
            if targets == seen.num_wanted:
                limit = f"all {config.max} targets that target.autoscale.max allows are there"
                return self._say("most", f"{why}, but {limit}")
        self._too_few.note(serving, seen.time_s)
        self._asked = serving, waited.part
        return self._decide(seen, max(targets, seen.num_wanted), why)

    def _shrink(self, seen: Observation, waited: Waited) -> Decision | None:
        config, serving = self._config, seen.num_serving
        if self._surplus_since_s is None:
            self._surplus_since_s = seen.time_s
        lasted_s = seen.time_s - max(self._surplus_since_s, self._changed_s)
        if lasted_s < config.down_cooldown_s:
            return None
        targets = serving - max(1, serving // DOWN_DIVISOR)
        if serving < seen.num_wanted:
            targets = serving  # the others are not missed
        self._too_few.suffices(serving)
        targets = max(targets, config.min, self._too_few.least(seen.time_s))
        if targets >= seen.num_wanted:
            return None
        self._too_few.tried(targets)
        why = f"captures waited for room for {lasted_s:.0f} s and the trainer {_waited(waited)}"
        return self._decide(seen, targets, why)

    def _decide(self, seen: Observation, targets: int, reason: str) -> Decision:
        self._settle(seen.time_s)
        self._changed_s = seen.time_s
        self._said = None
        return Decision(targets, reason)

    def _say(self, limit: str, reason: str) -> Decision | None:
        if self._said == limit:
            return None
        self._said = limit
        return Decision(None, reason)

    @property
    def _ready_fill(self) -> float:
        return sum(fill for _, fill, _ in self._looks) / len(self._looks)

    @property
    def _is_held_back(self) -> bool:
        return sum(is_held_back for *_, is_held_back in self._looks) >= HELD_BACK_PART * len(self._looks)


class _TooFew:
    """The largest number of targets that was too few, for a while."""

    def __init__(self, cooldown_s: float) -> None:
        self._first_s = RETRY_COOLDOWNS * cooldown_s
        self._most_s = MOST_RETRY_COOLDOWNS * cooldown_s
        self._targets = 0
        self._until_s = -math.inf
        self._patience_s = self._first_s
        self._tried: int | None = None
        """Where targets are being given up to find out whether it is still too few."""

    def note(self, targets: int, now_s: float) -> None:
        """So many were too few."""
        was_retried = targets == self._tried
        self._patience_s = min(2 * self._patience_s, self._most_s) if was_retried else self._first_s
        self._targets, self._until_s, self._tried = targets, now_s + self._patience_s, None

    def tried(self, targets: int) -> None:
        """Targets are given up until so many are left."""
        self._tried = targets if targets == self._targets else None

    def suffices(self, targets: int) -> None:
        """So many are enough now."""
        if targets <= self._targets:
            self.forget()

    def least(self, now_s: float) -> int:
        """How many are worth trying: no fewer at once than what was too few."""
        return self._targets + 1 if now_s < self._until_s else self._targets

    def forget(self) -> None:
        """Know of nothing that was too few."""
        self._targets, self._until_s, self._patience_s, self._tried = 0, -math.inf, self._first_s, None


def _waited(waited: Waited) -> str:
    return f"{_percent(waited.part)} of {waited.over_s:.0f} s"


def _percent(part: float) -> str:
    return f"{100 * part:.0f} %"
