"""The driver's side of autoscaling: shows the run to the autoscaler once a second and does what it decides."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from services.contracts import Autoscaling, Event, TableInfo, TargetState
from services.control.board import StatusBoard
from services.errors import UsageError
from services.target.autoscaler import Autoscaler, Decision, Observation
from services.target.config import TargetConfig
from services.target.pool import TargetPool
from services.target.trainer_wait import StepTime

LOOK_S = 1.0
"""How often the autoscaler sees the run; its figures are no newer."""

LOSSES = frozenset({"restart", "redis", "silent"})
"""Events after which the trainer waits for what was lost, and not for want of targets."""

PACE_STEPS = 20
"""How long the run goes on is told from so many of its last steps."""


class TargetScaling:
    """Scales one run's targets, by hand or by itself. A sink of the run's journal: steps and losses come in as records.

    Args:
        config: The recipe's `target` section.
        pool: The targets.
        board: Says whether the run trains.
        checkpoint_every: Steps between two checkpoints.
        report: Takes events.
    """

    def __init__(
        self,
        config: TargetConfig,
        pool: TargetPool,
        board: StatusBoard,
        checkpoint_every: int,
        report: Callable[[Event], None],
    ) -> None:
        self._bounds = config.autoscale
        self._autoscaler = Autoscaler(config.autoscale) if config.autoscale else None
        self._pool = pool
        self._board = board
        self._checkpoint_every = checkpoint_every
        self._report = report
        self._is_on = config.autoscale is not None
        self._suspended = f"autoscaling is suspended until `slipstream scale {board.status.run_id} autoscale=on`"
        self._steps: list[StepTime] = []
        self._pace_s: deque[float] = deque(maxlen=PACE_STEPS)
        self._steps_left: int | None = None
        self._was_hit = False
        self._next_look_s = 0.0

    def take(self, record: dict[str, Any]) -> None:
        """One record of the run."""
        if not self._is_on:
            return
        if record["kind"] == "step":
            # The clock of here: that of the ranks' machine may be another one.
            is_saved = record["step"] % self._checkpoint_every == 0
            self._steps.append(StepTime(time.monotonic(), record["step_s"], record["wait_s"], is_saved))
            self._pace_s.append(record["step_s"])
            self._steps_left = record["total_steps"] - record["step"]
        elif record["kind"] == "event" and record["event"] in LOSSES:
            self._was_hit = True

    def close(self) -> None:
        """Nothing is held."""

    def look(self, tables: Sequence[TableInfo]) -> None:
        """Show the run to the autoscaler, about once a second.

        Args:
            tables: What the replay tables last said of themselves.
        """
        now_s = time.monotonic()
        if self._autoscaler is None or not self._is_on or now_s < self._next_look_s:
            return
        self._next_look_s = now_s + LOOK_S
        decision = self._autoscaler.observe(self._observation(now_s, tables))
        if decision is not None:
            self._carry_out(decision)

    def by_hand(self, targets: int) -> str:
        """Have this many targets, whatever the autoscaler thinks of it; from now on it does not think.

        Returns:
            What else that means, in words.

        Raises:
            UsageError: The number is out of bounds; nothing is changed.
        """
        self._pool.scale(targets, "by hand" if self._bounds else "")
        if not self._is_on:
            return ""
        self._is_on = False
        self._say(self._suspended)
        return self._suspended

    def autoscale(self, is_on: bool) -> str:
        """Let the run scale its targets by itself, or no more.

        Returns:
            What that means, in words.

        Raises:
            UsageError: The recipe gives no bounds.
        """
        if self._autoscaler is None or self._bounds is None:
            raise UsageError(
                "autoscale=on needs bounds, and this run's recipe has no target.autoscale: stop the run and go on with "
                "target.autoscale.max=N, or scale it by hand (targets=N)"
            )
        before, self._is_on = self._is_on, is_on
        text = f"targets are autoscaled between {self._bounds.min} and {self._bounds.max}" if is_on else self._suspended
        if before == is_on:
            return text
        if is_on:
            self._autoscaler.forget(time.monotonic())
        self._say(text)
        return text

    def status(self) -> Autoscaling | None:
        """How the targets are scaled; None if only by hand."""
        if self._bounds is None:
            return None
        return Autoscaling(is_on=self._is_on, min=self._bounds.min, max=self._bounds.max)

    def _observation(self, now_s: float, tables: Sequence[TableInfo]) -> Observation:
        steps, self._steps = self._steps, []
        was_hit, self._was_hit = self._was_hit, False
        targets = [target for target in self._pool.states() if target.state != "draining"]
        blocked = [target for target in targets if target.state == "pending" and target.message]
        starting = [target for target in targets if target.state in ("loading", "silent", "quarantined", "pending")]
        left_s = None
        if self._steps_left is not None:
            left_s = self._steps_left * sum(self._pace_s) / len(self._pace_s)
        return Observation(
            time_s=now_s,
            steps=steps,
            ready_fill=ready_fill(tables),
            is_held_back=all(table.wanted_bytes > 0 or not table.can_insert for table in tables),
            num_wanted=len(targets),
            num_serving=sum(target.state == "serving" for target in targets),
            num_starting=len(starting) - len(blocked),
            blocked="; ".join(_name(target) for target in blocked),
            is_steady=self._board.status.state == "training" and not was_hit,
            has_captures_to_come=not all(table.sealed for table in tables),
            left_s=left_s,
        )

    def _carry_out(self, decision: Decision) -> None:
        if decision.targets is None:
            self._say(decision.reason)
            return
        self._pool.scale(decision.targets, decision.reason)
        self._board.set(num_targets_wanted=decision.targets)

    def _say(self, message: str) -> None:
        self._report(Event(time_s=time.time(), kind="autoscale", message=message))


def ready_fill(tables: Sequence[TableInfo]) -> float:
    """The part of the tables' capacity that holds samples which a trainer could take now, about.

    Tables know how many samples are ready, and the bytes of all that are resident, those leased and those under way
    from a target included: a buffer may be full of captures of which none has arrived. All are taken to be of one size.
    """
    ready_bytes = 0.0
    for table in tables:
        num_resident = table.inserts - table.deletes + table.num_inserting
        ready_bytes += table.resident_bytes * table.num_ready / max(1, num_resident)
    return ready_bytes / sum(table.capacity_bytes for table in tables)


def _name(target: TargetState) -> str:
    return f"target {target.index} {target.message}"
