"""One target server as the driver's watcher sees it, and which of several end first. State only: no Ray, no clock."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from services.contracts import TargetState, TargetStateName
from services.errors import SlipstreamError
from services.restarts import RestartBudget

ENDED_FIRST: tuple[TargetStateName, ...] = (*("failed", "pending", "loading", "quarantined", "silent", "serving"),)
"""Scaling down ends those first that give nothing."""

MOST_QUARANTINES = 3
QUARANTINES_S = 1800.0
"""A target that answers wrongly is restarted so often within this time; then its files or its device are to blame."""


@dataclass(eq=False)
class Replica:
    """What the watcher knows of one target; the pool changes it under its lock."""

    index: int
    actor: Any
    asked_s: float
    """When Ray was asked to place it, or began to place it anew."""
    is_added: bool = False
    """Started by `scale`, not with the run."""
    pulse: Any = None
    """The outstanding ping."""
    pinged_s: float = 0.0
    """When it was sent."""
    is_placed: bool = False
    is_dead: bool = False
    """Ray gave it up, or it never loaded; it will not come back."""
    address: str | None = None
    """Where it serves; None while it does not answer."""
    last_address: str | None = None
    failure: SlipstreamError | None = None
    missing: str = ""
    """What the cluster lacks to place it."""
    lost: str = ""
    """Why it does not answer any more."""
    restarted_s: float = float("-inf")
    quarantine: str = ""
    """Why its answers are not trusted: it is restarted, and serves again at another address."""
    banned_address: str | None = None
    """Where the process that is to end served, until that has ended."""
    quarantines: RestartBudget = field(default_factory=lambda: RestartBudget(MOST_QUARANTINES, QUARANTINES_S))
    drained_from_s: float | None = None
    """When it was told to end; its running captures finish first."""
    farewell: Any = None
    """The outstanding call that returns once its captures have finished."""

    @property
    def is_draining(self) -> bool:
        """Whether it ends once its captures have finished."""
        return self.drained_from_s is not None

    def starts(self, since_s: float) -> bool:
        """Whether it may serve any moment: it loads, or its process was asked for after `since_s`."""
        may_serve = self.address is None and not self.is_dead and not self.is_draining
        return may_serve and (self.is_placed or self.asked_s > since_s)

    @property
    def state(self) -> TargetStateName:
        """One word for it; `TargetState` says what each means."""
        if self.is_draining:
            return "draining"
        if self.is_dead or (self.failure is not None and self.last_address is None):
            return "failed"
        if self.address:
            return "serving"
        if self.quarantine:
            return "quarantined"
        if self.last_address:
            return "silent"
        return "loading" if self.is_placed else "pending"

    def ban(self, reason: str, now_s: float) -> bool:
        """Quarantine it: what serves at its address shall do so no more.

        Returns:
            Whether restarting it once more is worth the while.
        """
        self.quarantine, self.banned_address, self.address = reason, self.address, None
        return self.quarantines.spend(now_s) is not None

    def record(self) -> TargetState:
        """What the run's history and the views get."""
        waits = f"waits for {self.missing}" if self.missing else ""
        message = str(self.failure or "") or waits or self.quarantine or self.lost
        return TargetState(
            index=self.index,
            state=self.state,
            address=self.address or self.last_address,
            message="" if self.state == "serving" else message,
        )


def choose_to_end(replicas: Sequence[Replica], count: int) -> list[Replica]:
    """Which targets end when `count` of them shall: those that give nothing first, and of each kind the newest."""
    candidates = [replica for replica in replicas if not replica.is_draining]
    return sorted(candidates, key=lambda replica: (ENDED_FIRST.index(replica.state), -replica.index))[:count]
