"""The coordinator as a rank sees it: its answers, however often its process is killed in between."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

import ray

from services.contracts import SampleLease, StepLease, StepReport
from services.errors import DeadlineError, NotBegunError, PartDiedError, SlipstreamError
from trainer.account import Account
from trainer.cluster import ANSWER_DEADLINE_S, result_of

LEASE_DEADLINE_S = 600.0
"""How long the coordinator may take to grant a step: it may have to tokenise a long run of unusable prompts."""

LEDGER_DEADLINE_S = 120.0
"""How long the coordinator may wait for the other ranks' reports of a step that is already done."""

AWAY_DEADLINE_S = 120.0
"""How long the coordinator may be gone; the driver brings it back."""

RETRY_S = 0.2

BEAT_S = 0.5
"""How often a rank asks whether its account is wanted and sees to it that its reports have arrived."""

STOP_DEADLINE_S = 5.0


class CoordinatorClient:
    """What one rank asks and tells. A context manager: while it lasts, a thread gives the rank's account when wanted.

    Args:
        actor: Handle of the coordinator's actor.
        rank: This rank.
        generation: Of this trainer group; requests of an older one are refused.
    """

    def __init__(self, actor: Any, rank: int, generation: int) -> None:
        self._actor = actor
        self._rank = rank
        self._generation = generation
        self._account = Account(rank, generation)
        self._lock = threading.Lock()
        self._reports: dict[Any, StepReport] = {}
        """Reports under way, by the call that carries them."""
        self._error: SlipstreamError | None = None
        self._closing = threading.Event()
        self._beating = threading.Thread(target=self._beat, name="coordinator", daemon=True)

    def __enter__(self) -> Self:
        self._beating.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.set()
        self._beating.join(STOP_DEADLINE_S)

    def step_lease(self, step: int) -> StepLease:
        """What to do in a step; the same for every rank.

        Raises:
            DeadlineError: The coordinator does not answer.
            PausedError: The run is paused: ask again.
            StaleGenerationError: A newer trainer group has taken over.
        """
        deadline_s = time.monotonic() + LEASE_DEADLINE_S
        while True:
            try:
                lease: StepLease = self._ask("step_lease", step, self._generation)
            except DeadlineError:  # still encoding conversations, or beginning anew: ask again
                if time.monotonic() >= deadline_s:
                    raise
            else:
                self._account.grant(lease)
                return lease

    def hold(self, leases: Sequence[SampleLease]) -> bool:
        """Say that the samples of these leases are in memory; False if they are to be dropped (`Account.hold`)."""
        return self._account.hold(leases)

    def report(self, report: StepReport) -> None:
        """Say that a step is done; does not wait for an answer. Raises what the coordinator said of an earlier one."""
        self._account.report(report)
        with self._lock:
            self._send(report)
            self._settle()
            if self._error is not None:
                raise self._error

    def saved(self, step: int) -> None:
        """The checkpoint of a step is visible."""
        self._account.saved(step)

    def ledger_at(self, step: int) -> str:
        """The ledger after a step, as JSON lines; waits until every rank has reported it.

        Raises:
            DeadlineError: A rank's report or the answer does not come.
        """
        ledger: str = self._ask("ledger_at", step, LEDGER_DEADLINE_S, timeout_s=LEDGER_DEADLINE_S + ANSWER_DEADLINE_S)
        return ledger

    def planned_uses(self) -> int:
        """Uses in the plan.

        Raises:
            DeadlineError: The coordinator does not answer.
        """
        planned: int = self._ask("progress").planned
        return planned

    def _ask(self, question: str, *args: Any, timeout_s: float = ANSWER_DEADLINE_S) -> Any:
        """Ask, again and again while the coordinator's process is being brought back."""
        deadline_s = time.monotonic() + AWAY_DEADLINE_S
        while True:
            try:
                return self._ask_once(question, *args, timeout_s=timeout_s)
            except (PartDiedError, NotBegunError):
                if time.monotonic() >= deadline_s:
                    raise
                time.sleep(RETRY_S)

    def _ask_once(self, question: str, *args: Any, timeout_s: float) -> Any:
        return result_of(getattr(self._actor, question).remote(*args), "the coordinator", timeout_s=timeout_s)

    def _beat(self) -> None:
        while not self._closing.wait(BEAT_S):
            with self._lock:
                self._settle()
            try:
                wanted = self._ask_once("wanted", self._rank, self._generation, timeout_s=ANSWER_DEADLINE_S)
                if wanted is not None:
                    self._ask_once("join", self._account.answer(wanted), timeout_s=ANSWER_DEADLINE_S)
            except (DeadlineError, PartDiedError, NotBegunError):
                continue  # the next beat finds it back, or the training thread gives up
            except SlipstreamError as error:
                with self._lock:
                    self._error = self._error or error
                return

    def _send(self, report: StepReport) -> None:
        self._reports[self._actor.step_done.remote(report)] = report

    def _settle(self) -> None:
        """Take the answers that have come; what was under way to a process that died is sent again."""
        if not self._reports:
            return
        answered, _ = ray.wait(list(self._reports), num_returns=len(self._reports), timeout=0)
        for call in answered:
            report = self._reports.pop(call)
            try:
                result_of(call, "the coordinator")
            except (PartDiedError, NotBegunError):
                self._send(report)
            except SlipstreamError as error:
                self._error = self._error or error
