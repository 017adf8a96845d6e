"""Which checkpoints are measured when: the newest whenever the evaluator is free, and both ends after training."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import ray.exceptions

from evaluation.report import Report
from services.contracts import HeldoutPrompt, TargetState
from services.errors import CheckpointError, DeadlineError, PartDiedError, SlipstreamError
from services.placement import Node, alive_nodes
from trainer.checkpoint import checkpoint_path, checkpoint_step, latest_checkpoint
from trainer.evaluations import Evaluations
from trainer.supervision import Restarts

POLL_S = 0.25


def next_step(newest: int, last: int | None, every: int | None, end: int | None) -> int | None:
    """Which checkpoint a free evaluator measures during training, by its step; None leaves it free.

    The untrained drafter is first, then always the newest: those that came while it was busy are skipped.

    Args:
        newest: The newest checkpoint; 0 is the untrained drafter.
        last: The last that was measured; None if none was, not even the untrained one.
        every: Measure one for each interval of so many steps; None measures each.
        end: The run's last step, measured when training is over.
    """
    if last is None:
        return 0
    if newest <= last or newest == end:
        return None
    if every is not None and newest // every == last // every:
        return None
    return newest


def node_beside(targets: Sequence[TargetState], nodes: Sequence[Node]) -> str | None:
    """Address of the node that holds a serving target, if the cluster knows a node by that address."""
    hosts = (target.address.rpartition(":")[0] for target in targets if target.state == "serving" and target.address)
    return next((host for host in hosts if any(f"node:{host}" in node.resources for node in nodes)), None)


class Measuring:
    """Has the checkpoints of one attempt measured. Training goes on whatever becomes of that.

    Args:
        evaluations: The evaluator and its results.
        output_dir: Of the run.
        prompts: Held-out prompts.
        restarts: Of the evaluator.
        targets: What each target does now.
        show: Takes each result.
        say: Takes the kind and the words of an event.
    """

    def __init__(
        self,
        evaluations: Evaluations,
        output_dir: Path,
        prompts: Sequence[HeldoutPrompt],
        restarts: Restarts,
        targets: Callable[[], Sequence[TargetState]],
        show: Callable[[Report], None],
        say: Callable[[str, str], None],
    ) -> None:
        self._evaluations = evaluations
        self._output_dir = output_dir
        self._prompts = prompts
        self._restarts = restarts
        self._targets = targets
        self._show = show
        self._say = say
        self._config = evaluations.config
        self._is_on = evaluations.is_enabled and self._config.placement != "off"

    def look(self, last_step: int | None) -> None:
        """Take what has been measured during training, and have the next checkpoint measured. Waits for nothing.

        Args:
            last_step: Of the run.
        """
        if not self._is_on:
            return
        try:
            try:
                if report := self._evaluations.collect():
                    self._show(report)
                if self._evaluations.is_idle:
                    self._request_next(last_step)
            except PartDiedError as error:
                self._forget_evaluator(error)
        except (SlipstreamError, ray.exceptions.RayError) as error:
            self._is_on = False
            self._say("evaluation", f"nothing more is measured before the end of training: {error}")

    def finish(self, trained: Path, look: Callable[[], None]) -> None:
        """Have both ends of the training measured on all prompts, unless they are.

        Args:
            trained: The last checkpoint.
            look: Called about four times a second; what it raises ends the wait.

        Raises:
            DeadlineError: They are not within `evaluation.wait_s`.
            SlipstreamError: The evaluator failed, or dies again and again.
        """
        if not self._evaluations.is_enabled:
            return
        deadline_s = time.monotonic() + self._config.wait_s
        ends = (trained, checkpoint_path(self._output_dir, 0))
        while missing := [checkpoint for checkpoint in ends if self._evaluations.report(checkpoint) is None]:
            try:
                if self._evaluations.is_idle and not self._evaluations.request(missing[0], self._prompts):
                    raise CheckpointError(f"{missing[0]} was deleted before held-out prompts were decoded with it")
                self._evaluations.wait_started(look)
                self._await_report(deadline_s, look)
            except PartDiedError as error:
                self._forget_evaluator(error)

    def _await_report(self, deadline_s: float, look: Callable[[], None]) -> None:
        while not self._evaluations.is_idle:
            if report := self._evaluations.collect(timeout_s=POLL_S):
                self._show(report)
            elif time.monotonic() > deadline_s:
                raise DeadlineError(
                    f"held-out prompts were still being decoded with {self._evaluations.under_way} "
                    f"{self._config.wait_s:g} s after training (evaluation.wait_s). The drafter is whole, in "
                    f"{self._output_dir}; the same command measures it with a longer evaluation.wait_s, fewer prompts "
                    f"than evaluation.max_samples={self._config.max_samples}, or not at all with 0"
                )
            look()

    def _request_next(self, last_step: int | None) -> None:
        newest = latest_checkpoint(self._output_dir)
        newest_step = checkpoint_step(newest) if newest else 0
        untrained = checkpoint_path(self._output_dir, 0)
        last = self._evaluations.last_step(newest_step) if self._evaluations.has_measured(untrained) else None
        step = next_step(newest_step, last, self._config.every, last_step)
        if step is not None:
            beside = node_beside(self._targets(), alive_nodes()) if self._config.is_low_priority else None
            checkpoint = checkpoint_path(self._output_dir, step)
            self._evaluations.request(checkpoint, self._prompts, self._config.num_during, during=True, beside=beside)

    def _forget_evaluator(self, cause: PartDiedError) -> None:
        """The next request starts another one."""
        self._restarts.count(time.monotonic(), cause)
        self._evaluations.close()
        self._say("restart", "the evaluator lost its process; what it was measuring is measured again")
