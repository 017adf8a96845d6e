"""One target server as the driver's watcher sees it, and which of several end first. State only: no Ray, no clock."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from services.contracts import TargetState, TargetStateName
from services.errors import SlipstreamError

ENDED_FIRST: tuple[TargetStateName, ...] = ("failed", "pending", "loading", "silent", "serving")
"""Scaling down ends those first that give nothing."""


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
    drained_from_s: float | None = None
    """When it was told to end; its running captures finish first."""
    farewell: Any = None
    """The outstanding call that returns once its captures have finished."""

    @property
    def is_draining(self) -> bool:
        """Whether it ends once its captures have finished."""
        return self.drained_from_s is not None

    @property
    def state(self) -> TargetStateName:
        """One word for it; `TargetState` says what each means."""
        if self.is_draining:
            return "draining"
        if self.is_dead or (self.failure is not None and self.last_address is None):
            return "failed"
        if self.address:
            return "serving"
        if self.last_address:
            return "silent"
        return "loading" if self.is_placed else "pending"

    def record(self) -> TargetState:
        """What the run's history and the views get."""
        waits = f"waits for {self.missing}" if self.missing else ""
        message = str(self.failure or "") or waits or self.lost
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
