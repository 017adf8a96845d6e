"""Which captures are made next and which steps are granted: state and outcomes in, decisions out.

The schedule owns no thread, no Redis and no clock. A capture goes through these states:

    next_to_encode ─► add ─► staged ─► take_pushable ─► in flight ─► on_outcome: committed
          ▲            └► skip                                └───► failed: encoded again, or its uses are skipped
          └────────────────────────────────────────────────────────────┘

Conversations are encoded ahead of grants, because a step is granted only once a full one is known to exist; they are
pushed ahead of grants too, as far as the work queue and the buffer have room.

    good     uses of encoded captures that have not failed for good
    granted  uses that granted steps will train, at most good

A schedule can begin beside ranks that are in the middle of their work: because the coordinator lost its process or the
buffer all it held. Then the accounts of the ranks say what was granted and reported, and which uses they hold; those
are good from the start and never captured again, and everything else goes through the states above anew.

Each capture goes to one of the run's shards (`Router`). When a shard loses what it held, the ranks' accounts say in the
same way what of it they have; the rest of it, and nothing of the other shards, is encoded again (`lose`).

A full step is granted while good − granted ≥ uses per step. In ready order (not deterministic) a step takes whatever is
ready: if a capture fails for good after its step was granted, the next capture fills its place, and at the very end
the trainer pads.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Collection, Sequence
from typing import NamedTuple

from services.contracts import CaptureJob, Outcome, RankAccount, StepLease, StepReport
from services.errors import PromptError, ReplayError, StaleGenerationError
from services.prompts.ledger import Ledger, StepLine
from services.prompts.records import CoordinatorSettings
from services.prompts.routing import Router

MAX_ATTEMPTS = 5
"""Tries of one capture without a commit before its uses are skipped: a prompt that fails on every target it meets must
not hold the run up for ever. The shard itself has tried other targets within each of them."""

MAX_GIVEN_UP_IN_A_ROW = 32
"""Captures given up with none committed between them before the run ends: then it is not the prompts. A buffer that is
too small for any sample would otherwise pass over the whole plan."""

SKIPPED_FAILED = "capture failed"
SKIPPED_TAIL = "tail"

END_EXHAUSTED = "plan exhausted"
END_MAX_STEPS = "max_steps reached"
END_STOPPED = "stopped"


class Routed(NamedTuple):
    """A job for the work queue of a shard."""

    shard: int
    job: CaptureJob


class Committed(NamedTuple):
    """A capture to log, and why it was made again if it was."""

    outcome: Outcome
    why_again: str


class Schedule:
    """Captures, grants and reports of one trainer group.

    Attributes:
        ended: Why no further step is granted, or None.
        last_failure: The last capture that failed, and why.
        is_paused: While true, no further step is granted; `grant` then answers None.
    """

    def __init__(
        self,
        ledger: Ledger,
        settings: CoordinatorSettings,
        accounts: Sequence[RankAccount] = (),
        why_again: str | None = None,
    ) -> None:
        """Begin after the ledger's last step; everything that it does not have as trained or skipped goes (again).

        Args:
            ledger: Steps that the accounts report are added to it.
            settings: How the prompts are used.
            accounts: One of each rank that is at work; none where the ranks begin as well.
            why_again: Goes into the capture log with each capture that was made before.

        Raises:
            ReplayError: The accounts do not reach back to the ledger, or contradict it.
        """
        assert not (settings.deterministic and settings.reuse > 1), "no recipe has both"
        self.ended: str | None = None
        self.last_failure: str | None = None
        self.is_paused = False
        self._ledger = ledger
        self._settings = settings
        self._why_again = why_again or (
            f"not trained at step {ledger.last_step}, where the run resumed"
            if ledger.last_step
            else "not trained when the run began again"
        )
        self._cursor = 0
        self._exhausted = False
        self._retry: deque[int] = deque()
        self._retrying: dict[int, tuple[int, str]] = {}  # capture → (last attempt, why it is made again)
        self._reasons: dict[int, str] = {}
        self._failures: dict[int, int] = {}
        self._given_up_in_a_row = 0
        self._staged: deque[CaptureJob] = deque()
        """In plan order."""
        self._router = Router(settings.num_shards, by_plan=settings.deterministic)
        self._in_flight: dict[int, int] = {}  # capture → attempt
        self._good_uses = 0
        self._granted_uses = 0
        self._pushed_uses = 0
        self._ungranted: deque[int] = deque()  # captures in plan order; deterministic mode only
        self._named: dict[int, int] = {}  # capture → step it was granted to; deterministic mode only
        self._last_granted = ledger.last_step
        self._leases: dict[int, StepLease] = {}
        self._reports: dict[int, dict[int, StepReport]] = {}
        self._taken: set[int] = set()
        """Uses that the ranks held or had reported when this schedule began beside them, or when a shard was lost: they
        are counted as pushed, and never captured again."""
        self._take_over(accounts)
        self._first_step = ledger.last_step + 1

    def _take_over(self, accounts: Sequence[RankAccount]) -> None:
        for account in accounts:
            steps = [report.step for report in account.reports if report.step > self._ledger.last_step]
            if steps and steps[0] != self._ledger.last_step + 1:
                raise ReplayError(
                    f"the account of rank {account.rank} begins at step {steps[0]}, the ledger ends at step "
                    f"{self._ledger.last_step}: the steps between are not known"
                )
        for account in accounts:
            for report in account.reports:
                if report.step > self._ledger.last_step:
                    self._reports.setdefault(report.step, {})[account.rank] = report
        self._finish_steps()
        for lease in (lease for account in accounts for lease in account.leases):
            if lease.is_end:
                self.ended = lease.end
            elif lease.step > self._ledger.last_step:
                self._leases[lease.step] = lease
        self._last_granted = max([self._ledger.last_step, *self._leases])
        self._granted_uses = sum(lease.num_uses for lease in self._leases.values())
        for lease in self._leases.values():
            self._named.update(dict.fromkeys(_named_captures(lease), lease.step))
        held = (use for account in accounts for use in account.held if self._ledger.is_open(use))
        self._taken = {*held, *self._under_way()}
        self._good_uses = self._pushed_uses = len(self._taken)
        self._settle_tail()

    # Captures

    def next_to_encode(self) -> int | None:
        """The capture to encode now, or None if none is wanted yet; answer with `add` or `skip` before asking again."""
        if self._retry:
            return self._retry[0]
        if not self._wants_more():
            return None
        num_captures = self._ledger.plan.num_captures
        while self._cursor < num_captures and not self._wanted_ks(self._cursor):
            self._cursor += 1
        if self._cursor == num_captures:
            self._exhausted = True
            return None
        return self._cursor

    def attempt(self, capture: int, *, at_least: int) -> int:
        """The number of this capture's next attempt, at least as high as the capture log asks for."""
        last, _ = self._retrying.get(capture, (-1, ""))
        return max(last + 1, at_least)

    def remaining_ks(self, capture: int) -> tuple[int, ...]:
        """The k of a capture's uses that no finished step and no report has, and no rank holds, ascending."""
        first = capture * self._ledger.plan.reuse
        under_way = self._under_way()
        return tuple(k for k in self._wanted_ks(capture) if first + k not in under_way)

    def add(self, job: CaptureJob) -> None:
        """The capture of `next_to_encode`, encoded."""
        if self._is_retry(job.capture):
            self._retry.popleft()
            _, self._reasons[job.capture] = self._retrying.pop(job.capture)
            insort(self._staged, job, key=lambda staged: staged.capture)
            self._pushed_uses -= self._num_wanted(job.capture)
            return
        self._cursor += 1
        self._good_uses += self._num_wanted(job.capture)
        self._staged.append(job)
        if self._settings.deterministic and job.capture not in self._named:
            self._ungranted.append(job.capture)

    def skip(self, capture: int, reason: str, detail: str) -> None:
        """The capture of `next_to_encode` cannot be made: its open uses will never be trained."""
        if self._is_retry(capture):
            self._retry.popleft()
            del self._retrying[capture]
            self._pushed_uses -= self._num_wanted(capture)
            self._give_up(capture, reason, detail)
            return
        self._cursor += 1
        self._skip_open(capture, reason, detail)

    def take_pushable(self, rooms: Sequence[int]) -> list[Routed]:
        """The jobs that go to the work queues now, oldest first.

        Args:
            rooms: Most jobs that the queue of each shard takes.
        """
        left = list(rooms)
        routed: list[Routed] = []
        while self._has_pushable() and (shard := self._router.choose(self._staged[0].capture, left)) is not None:
            job = self._staged.popleft()
            left[shard] -= 1
            self._in_flight[job.capture] = job.attempt
            self._pushed_uses += self._num_wanted(job.capture)
            self._router.put(job.capture, shard, self._settings.signature.reserved_bytes(job))
            routed.append(Routed(shard, job))
        return routed

    def lose(self, shards: Collection[int], accounts: Sequence[RankAccount], why: str) -> None:
        """All that these shards held or were to capture is gone: what no rank has in memory is encoded again.

        Not between `next_to_encode` and its answer.

        Args:
            shards: Their tables and queues are empty, and take captures again.
            accounts: One of each rank, given since: no rank takes samples of the lost tables any more.
            why: Goes into the capture log with each capture that is made again.

        Raises:
            ReplayError: The accounts report what `report` refuses.
        """
        for report in (report for account in accounts for report in account.reports):
            if report.step > self._ledger.last_step:
                self.report(report)
        has_been = {use for account in accounts for use in account.held} | self._under_way()
        for capture in sorted(capture for shard in shards for capture in self._router.on(shard)):
            self._router.remove(capture)
            first, attempt = capture * self._ledger.plan.reuse, self._in_flight.pop(capture, -1)
            self._taken.update(first + k for k in self._wanted_ks(capture) if first + k in has_been)
            if self._wanted_ks(capture):
                self._retrying[capture] = (attempt, why)
        self._retry = deque(sorted(self._retrying))

    def on_outcome(self, outcome: Outcome) -> Committed | None:
        """Take note of what became of a capture.

        Returns:
            What to log, if a capture was committed. An attempt older than the one in flight is logged all the same:
            a target made it.

        Raises:
            ReplayError: `MAX_GIVEN_UP_IN_A_ROW` captures failed for good, or, in deterministic mode, one that a granted
                step names.
        """
        capture = outcome.capture
        expected = self._in_flight.get(capture)
        if outcome.kind == "committed":
            # The shard counts tries on by itself, so a newer attempt than was pushed is the pushed one.
            self._given_up_in_a_row = 0
            if expected is not None and outcome.attempt >= expected:
                del self._in_flight[capture]
                self._failures.pop(capture, None)
                if outcome.num_bytes:  # fewer than reserved, where the target's answer was short
                    self._router.resize(capture, outcome.num_bytes)
            return Committed(outcome, self._reasons.pop(capture, self._why_again))
        if expected is not None and outcome.attempt < expected:
            return None
        was_lost = expected is None and self._was_pushed(capture)
        if expected is None and not was_lost:
            return None
        self._in_flight.pop(capture, None)
        self._router.remove(capture)
        self.last_failure = f"capture {capture}, attempt {outcome.attempt}: {outcome.reason}"
        failures = self._failures[capture] = self._failures.get(capture, 0) + 1
        if outcome.retry and failures < MAX_ATTEMPTS:
            self._retrying[capture] = (outcome.attempt, outcome.reason)
            self._retry.append(capture)
        else:
            tries = f" after {failures} tries" if outcome.retry else ""
            self._pushed_uses -= self._num_wanted(capture)
            self._give_up(capture, SKIPPED_FAILED, f"{outcome.reason}{tries}")
            self._given_up_in_a_row += 1
            if self._given_up_in_a_row == MAX_GIVEN_UP_IN_A_ROW:
                raise ReplayError(
                    f"{MAX_GIVEN_UP_IN_A_ROW} captures in a row failed for good, the last one because: {outcome.reason}"
                )
        return None

    @property
    def is_complete(self) -> bool:
        """Whether nothing more will be inserted: the table can be sealed."""
        return not (self._in_flight or self._retry or self._has_pushable() or self._wants_more())

    # Steps

    def grant(self, step: int, generation: int) -> StepLease | None:
        """Grant a step; the same step again gives the same lease.

        Returns:
            None if too few conversations have been encoded yet, or the run is paused: ask again.

        Raises:
            StaleGenerationError: Another trainer group is the current one.
            ReplayError: The step is not the next one.
            PromptError: Not one conversation of the plan can be trained on.
        """
        self._check_generation(generation)
        if step in self._leases:
            return self._leases[step]
        if self._first_step <= step <= self._last_granted:
            raise ReplayError(f"step {step} is done; the next to grant is {self._last_granted + 1}")
        if not self.ended and step != self._last_granted + 1:
            raise ReplayError(f"step {step} was asked for, the next is {self._last_granted + 1}: steps go in order")
        if not self.ended:
            if self.is_paused:  # what one rank was granted before, the others still get: they train a step together
                return None
            lease = self._grant_next(step)
            if lease is not None or not self.ended:
                return lease
        return StepLease(step=step, num_micro_batches=0, end=self.ended)

    def check_usable(self) -> None:
        """Raise if nothing of the plan is left to train and nothing was trained.

        Raises:
            PromptError: It says why the uses were skipped.
        """
        if self._exhausted and self._good_uses == 0 and self._ledger.num_trained == 0:
            raise PromptError(f"not one conversation of the plan can be trained on: {self._skipped_text()}")

    def stop(self) -> None:
        """Grant no further step; what granted steps need is still captured."""
        self.ended = self.ended or END_STOPPED

    def report(self, report: StepReport) -> None:
        """Take note that a rank has done a step; its uses count as trained once every rank has.

        Raises:
            StaleGenerationError: The report comes from another trainer group.
            ReplayError: The step was not granted, the rank does not exist or has reported something else, or a use
                cannot be trained. Nothing is changed.
        """
        self._check_generation(report.generation)
        if not 0 <= report.rank < self._settings.world_size:
            raise ReplayError(f"rank {report.rank} is not one of the {self._settings.world_size} ranks")
        if report.step <= self._ledger.last_step and self._ledger.has_trained(report.uses):
            return
        if not self._ledger.last_step < report.step <= self._last_granted:
            raise ReplayError(
                f"rank {report.rank} reports step {report.step}, but only steps {self._ledger.last_step + 1} to "
                f"{self._last_granted} are under way"
            )
        ranks = self._reports.setdefault(report.step, {})
        if report.rank in ranks:
            if ranks[report.rank] != report:
                raise ReplayError(f"rank {report.rank} reports step {report.step} twice, with different uses")
            return
        self._ledger.check_uses(report.uses)
        twice = sorted(self._under_way().intersection(report.uses))
        if twice:
            raise ReplayError(f"rank {report.rank} reports use {twice[0]} in step {report.step}, as another one does")
        ranks[report.rank] = report
        self._finish_steps()

    @property
    def steps_granted(self) -> int:
        """Number of the last step that was granted."""
        return self._last_granted

    def _finish_steps(self) -> None:
        while len(self._reports.get(self._ledger.last_step + 1, {})) == self._settings.world_size:
            step = self._ledger.last_step + 1
            reports = self._reports.pop(step).values()
            uses = tuple(sorted(use for report in reports for use in report.uses))
            num_tokens = sum(report.num_tokens for report in reports)
            self._ledger.add_step(
                StepLine(step=step, generation=self._settings.generation, uses=uses, num_tokens=num_tokens)
            )
            for capture in {use // self._ledger.plan.reuse for use in uses}:
                if not self._ledger.open_ks(capture):
                    self._router.remove(capture)
            self._leases.pop(step, None)
            self._named = {capture: granted for capture, granted in self._named.items() if granted > step}
        self._settle_tail()

    def _grant_next(self, step: int) -> StepLease | None:
        settings = self._settings
        if settings.max_steps is not None and step > settings.max_steps:
            self.ended = END_MAX_STEPS
            return None
        available = self._good_uses - self._granted_uses
        if available >= settings.uses_per_step:
            return self._lease(step, settings.accumulation, settings.uses_per_step)
        if not self._exhausted:
            return None
        self.check_usable()
        if settings.tail == "pad" and available > 0:
            return self._lease(step, -(-available // settings.uses_per_round), available)
        self.ended = END_EXHAUSTED
        self._settle_tail()
        return None

    def _lease(self, step: int, num_micro_batches: int, num_uses: int) -> StepLease:
        captures = self._name(num_micro_batches, num_uses, step) if self._settings.deterministic else None
        lease = StepLease(step=step, num_micro_batches=num_micro_batches, num_uses=num_uses, captures=captures)
        self._granted_uses += num_uses
        self._last_granted = step
        self._leases[step] = lease
        return lease

    def _name(self, num_micro_batches: int, num_uses: int, step: int) -> tuple[tuple[tuple[int, ...], ...], ...]:
        """captures[rank][micro_batch]: micro-batch m of all ranks together is one consecutive piece of plan order."""
        order = [self._ungranted.popleft() for _ in range(num_uses)]
        self._named.update(dict.fromkeys(order, step))
        size = self._settings.micro_batch_size

        def piece(rank: int, micro_batch: int) -> tuple[int, ...]:
            start = micro_batch * self._settings.uses_per_round + rank * size
            return tuple(order[start : start + size])

        return tuple(
            tuple(piece(rank, micro_batch) for micro_batch in range(num_micro_batches))
            for rank in range(self._settings.world_size)
        )

    def _settle_tail(self) -> None:
        """Once the last step is done and the plan has run out, what `tail: drop` left over counts as skipped."""
        is_over = self.ended == END_EXHAUSTED and self._ledger.last_step == self._last_granted
        if is_over and self._settings.tail == "drop":
            left = self._ledger.open_uses()
            if left:
                self._ledger.skip(left, SKIPPED_TAIL, f"fewer than the {self._settings.uses_per_step} of a full step")

    # Bookkeeping

    def _allowed_uses(self) -> int | None:
        """The uses that granted and future steps can train in all; None is unbounded."""
        if self.ended:
            return self._granted_uses
        if self._settings.max_steps is None:
            return None
        steps = max(self._settings.max_steps - self._first_step + 1, 0)
        return steps * self._settings.uses_per_step

    def _wants_more(self) -> bool:
        """Whether captures beyond those encoded are wanted."""
        allowed = self._allowed_uses()
        if self._exhausted or (allowed is not None and self._good_uses >= allowed):
            return False
        return self._good_uses - self._granted_uses < self._settings.uses_per_step or not self._has_pushable()

    def _has_pushable(self) -> bool:
        if not self._staged:
            return False
        if self._staged[0].capture in self._named:  # its step is granted, however few are still allowed
            return True
        limit = self._allowed_uses()
        if self._settings.tail == "drop" and not self.ended:
            full = self._good_uses // self._settings.uses_per_step * self._settings.uses_per_step
            limit = max(self._granted_uses, full if limit is None else min(limit, full))
        return limit is None or self._pushed_uses < limit

    def _under_way(self) -> set[int]:
        return {use for ranks in self._reports.values() for report in ranks.values() for use in report.uses}

    def _is_retry(self, capture: int) -> bool:
        return bool(self._retry) and self._retry[0] == capture

    def _was_pushed(self, capture: int) -> bool:
        """Whether a capture that is not in flight was pushed before and still has uses to feed."""
        if capture >= self._cursor or capture in self._retrying or not self._wanted_ks(capture):
            return False
        return all(job.capture != capture for job in self._staged)

    def _wanted_ks(self, capture: int) -> tuple[int, ...]:
        """The k of a capture's open uses, without those that the ranks held when this schedule began."""
        first = capture * self._ledger.plan.reuse
        return tuple(k for k in self._ledger.open_ks(capture) if first + k not in self._taken)

    def _num_wanted(self, capture: int) -> int:
        return len(self._wanted_ks(capture))

    def _give_up(self, capture: int, reason: str, detail: str) -> None:
        """Skip the uses of a capture that was counted as good."""
        if capture in self._named:
            raise ReplayError(
                f"capture {capture} failed for good ({detail}), but step {self._named[capture]} is granted with it, "
                "and a deterministic run cannot take another in its place. Mend the cause and resume from the last "
                "checkpoint, or set trainer.deterministic to false."
            )
        if self._settings.deterministic:
            self._ungranted.remove(capture)
        self._good_uses -= self._num_wanted(capture)
        self._skip_open(capture, reason, detail)

    def _skip_open(self, capture: int, reason: str, detail: str) -> None:
        first = capture * self._ledger.plan.reuse
        self._ledger.skip([first + k for k in self._wanted_ks(capture)], reason, detail)

    def _skipped_text(self) -> str:
        return "; ".join(
            f"{count} uses {reason} (such as {self._ledger.skip_examples[reason]})"
            for reason, count in sorted(self._ledger.skipped.items())
        )

    def _check_generation(self, generation: int) -> None:
        if generation != self._settings.generation:
            raise StaleGenerationError(
                f"generation {generation} is not the current one, {self._settings.generation}: "
                "this trainer group has been replaced"
            )


def _named_captures(lease: StepLease) -> list[int]:
    """All captures that a lease names."""
    return [capture for rank in lease.captures or () for micro_batch in rank for capture in micro_batch]
