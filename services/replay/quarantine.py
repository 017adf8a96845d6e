"""Who is to blame for a capture that went wrong: its target or its prompt? Faults in, verdicts out; no Redis, no clock.

A fault leaves a mark. Marks weigh against the target that gave them and against the capture that got them
(`AGAINST_TARGET`, `AGAINST_CAPTURE`); whoever reaches `LIMIT` is found guilty, the capture first.

    target    sum over captures of the last `WINDOW_S`: the weight of its fault, once a capture
    capture   sum over targets: the weight of its fault, once a target

A fault that comes again from the same target says more. If the target has answered other captures well since the first
one, each repetition counts against the capture, otherwise against the target: it may be the only one, and do nothing
right. A quarantined target's marks are worth nothing, but the capture is remembered to have met it: after the restart
two faults are enough. A capture's guilt clears its targets.
"""

from __future__ import annotations

import threading
from collections.abc import Collection
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from services.errors import (
    CaptureRequestError,
    FeatureError,
    SignatureError,
    SlipstreamError,
    TargetAccessError,
    TargetBusyError,
    TargetStalledError,
    TargetUnavailableError,
    WireError,
)


class Fault(StrEnum):
    """How a capture goes wrong at a target."""

    IDENTITY = "is no target of this run"
    """Other weights, another wire version, another token."""
    WIRE = "broke the protocol"
    """Wrong shape, rows, order or checksum."""
    STALLED = "gave nothing for too long"
    FEATURES = "gave NaN or infinity"
    FAILED = "failed to compute"
    REFUSED = "refused the request"
    """As one that it cannot serve."""
    GONE = "broke off"
    """Dead, stopping, or its connection lost."""


LIMIT = 6

AGAINST_TARGET = {
    Fault.IDENTITY: 6,  # it says so itself
    Fault.WIRE: 3,  # no prompt changes a checksum; but one flipped bit is no broken target
    Fault.STALLED: 3,  # each one has cost the whole deadline
    Fault.FEATURES: 2,  # one prompt may overflow
    Fault.FAILED: 2,  # one prompt may need too much memory
    Fault.REFUSED: 0,  # the request is to blame until another target takes it
    Fault.GONE: 1,  # Ray restarts what is dead; this is for what lives and serves nobody
}

AGAINST_CAPTURE = {
    Fault.IDENTITY: 0,
    Fault.WIRE: 2,
    Fault.STALLED: 2,
    Fault.FEATURES: 3,  # on two different targets
    Fault.FAILED: 3,
    Fault.REFUSED: 3,
    Fault.GONE: 1,  # six targets died of it
}

REFUSED_BUT_TAKEN = 3
"""Weight against a target that refused a capture which another one then made."""

GONE_APART_S = 10.0
"""Targets that break off one after another within this time lost their node or their network: no capture did that."""

WINDOW_S = 120.0
"""Older marks against a target are forgotten."""


class Verdict(NamedTuple):
    """What follows from a fault. Both None: try again, elsewhere if possible."""

    quarantine: str | None = None
    """Why the target is to be asked no more, until it has restarted."""
    skip: str | None = None
    """Why the capture is given up for good."""
    address: str | None = None
    """The quarantined target, if it is not the one that was asked last."""


@dataclass(frozen=True)
class _Mark:
    capture: int
    fault: Fault
    time_s: float
    num_good: int
    """Captures that the target had made when it failed this one."""


@dataclass
class _Target:
    num_good: int = 0
    marks: list[_Mark] = field(default_factory=list)
    quarantine: str | None = None
    """Why it is not to be asked."""


@dataclass
class _Capture:
    marks: dict[str, list[_Mark]] = field(default_factory=dict)
    """By address of the target."""
    has_met_broken: bool = False
    """A target that failed it has been quarantined since."""
    gone_s: float = float("-inf")
    """When a target last broke off with it."""


class Judge:
    """Keeps the marks of one shard. Threads may share it; time is passed in."""

    def __init__(self) -> None:
        """Know nothing of anyone."""
        self._lock = threading.Lock()
        self._targets: dict[str, _Target] = {}
        self._captures: dict[int, _Capture] = {}

    def fault(
        self,
        address: str,
        capture: int,
        fault: Fault,
        reason: str,
        now_s: float,
        *,
        num_live: int,
        against_target: bool = True,
    ) -> Verdict:
        """Note a fault and judge.

        Args:
            address: Of the target.
            capture: Which capture failed there.
            fault: How.
            reason: In words, for the verdict.
            now_s: The time.
            num_live: Targets that answer now: what the only one refuses nobody else will take.
            against_target: False if the fault has the same cause as one that was noted: captures fall together with
                their target.
        """
        with self._lock:
            target = self._targets.setdefault(address, _Target())
            known = self._captures.setdefault(capture, _Capture())
            if target.quarantine is not None:
                known.has_met_broken = True
                return Verdict()
            mark = _Mark(capture, fault, now_s, target.num_good)
            if fault is not Fault.GONE or now_s - known.gone_s >= GONE_APART_S:
                known.gone_s = now_s if fault is Fault.GONE else known.gone_s
                known.marks.setdefault(address, []).append(mark)
            if self._is_guilty(known, is_alone=num_live <= 1):
                for other in known.marks:
                    self._clear(other, capture)
                return Verdict(skip=f"{reason} ({_how_often(known)})")
            if against_target and AGAINST_TARGET[fault]:
                target.marks = [old for old in target.marks if old.time_s > now_s - WINDOW_S]
                target.marks.append(mark)
            if self._weight(target) < LIMIT:
                return Verdict()
            return Verdict(quarantine=self._quarantine(address, reason))

    def good(self, address: str, capture: int) -> Verdict:
        """Note that a target made a capture. Whoever refused it before was wrong."""
        with self._lock:
            target = self._targets.setdefault(address, _Target())
            target.num_good += 1
            target.marks = [mark for mark in target.marks if mark.fault is not Fault.STALLED]  # slow, not stuck
            known = self._captures.get(capture)
            for other, marks in known.marks.items() if known else ():
                accused = self._targets.get(other)
                if accused and accused.quarantine is None and marks[-1].fault is Fault.REFUSED:
                    accused.marks.append(marks[-1])
                    if self._weight(accused) >= LIMIT:
                        reason = f"other targets made captures that it refused, such as {capture}"
                        return Verdict(quarantine=self._quarantine(other, reason), address=other)
            return Verdict()

    def ended(self, capture: int) -> None:
        """Forget a capture that is made, skipped, or somebody else's now."""
        with self._lock:
            self._captures.pop(capture, None)

    def forget_all_but(self, live: Collection[str]) -> None:
        """Forget targets that are published no more: a restarted one has another address, or is another one there."""
        with self._lock:
            for address in [address for address in self._targets if address not in live]:
                del self._targets[address]

    def quarantined(self) -> dict[str, str]:
        """Targets not to be asked, and why."""
        with self._lock:
            return {address: target.quarantine for address, target in self._targets.items() if target.quarantine}

    def _is_guilty(self, known: _Capture, *, is_alone: bool) -> bool:
        if is_alone and any(mark.fault is Fault.REFUSED for marks in known.marks.values() for mark in marks):
            return True
        weight = 0
        for address, marks in known.marks.items():
            says_more = known.has_met_broken or self._was_well_since(address, marks[0])
            repeats = sum(mark.fault is not Fault.GONE for mark in marks) if says_more else 1
            weight += max(repeats, 1) * max(AGAINST_CAPTURE[mark.fault] for mark in marks)
        return weight >= LIMIT

    def _was_well_since(self, address: str, first: _Mark) -> bool:
        target = self._targets.get(address)
        return target is not None and target.num_good > first.num_good

    @staticmethod
    def _weight(target: _Target) -> int:
        weight = 0
        for capture in {mark.capture for mark in target.marks}:
            marks = [mark for mark in target.marks if mark.capture == capture]
            repeats = 1 if target.num_good > marks[0].num_good else len(marks)
            weight += repeats * max(AGAINST_TARGET[mark.fault] or REFUSED_BUT_TAKEN for mark in marks)
        return weight

    def _clear(self, address: str, capture: int) -> None:
        if address in self._targets:
            target = self._targets[address]
            target.marks = [mark for mark in target.marks if mark.capture != capture]

    def _quarantine(self, address: str, reason: str) -> str:
        target = self._targets[address]
        counts = {fault: sum(mark.fault is fault for mark in target.marks) for fault in Fault}
        what = ", ".join(f"{fault.value} {_times(count)}" for fault, count in counts.items() if count)
        target.quarantine = f"it {what}: {reason}"
        target.marks = []
        for known in self._captures.values():
            known.has_met_broken |= known.marks.pop(address, None) is not None
        return target.quarantine


def fault_of(error: SlipstreamError) -> Fault | None:
    """Which fault an error of a target's client, or of the check of what arrived, is; None is none: the target is full.

    A SignatureError is one that the target's own description shows; one that lets nobody in is none of this run either.
    """
    match error:
        case TargetBusyError():
            return None
        case SignatureError() | TargetAccessError():
            return Fault.IDENTITY
        case WireError():
            return Fault.WIRE
        case TargetStalledError():
            return Fault.STALLED
        case TargetUnavailableError():
            return Fault.GONE
        case FeatureError():
            return Fault.FEATURES
        case CaptureRequestError():
            return Fault.REFUSED
        case _:
            return Fault.FAILED


def _how_often(known: _Capture) -> str:
    num_faults = sum(map(len, known.marks.values()))
    if num_faults == 1:
        return "there is no other target to ask"
    num_targets = len(known.marks)
    if num_targets == 1:
        return f"{_times(num_faults)} on a target that {'has restarted' if known.has_met_broken else 'serves others'}"
    return f"on {num_targets} different targets"


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"
