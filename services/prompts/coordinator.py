"""The prompt source of a run: feeds the work queue, grants steps, keeps the ledger. Runs as a threaded Ray actor.

One feeder thread drains the tables' outcomes, encodes conversations and pushes captures; the calls of ranks and driver
come in on other threads. All state is in `Schedule`, `Ledger`, `CaptureLog` and `Buffer`, behind one condition.

The schedule is made anew, over empty tables, whenever what it knew is no longer so:

    a new trainer group begins      `begin_group`: from the ledger of its checkpoint
    this process was killed         from the newest checkpoint's ledger, and the ranks' accounts

Until every rank has given its account (`wanted`, `join`) no step is granted and no capture asked for then. A Redis that
restarted empty costs the schedule only what it held: what no rank's account has of it is captured again; in the
meantime steps are granted, and the other shards captured to, as before.

A life of the coordinator is the time between two such moments; attempts of a life are numbered above those of all
earlier ones, so whatever was under way before can never be taken for what is asked for now.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from services.contracts import HeldoutPrompt, Outcome, RankAccount, StepLease, StepReport
from services.errors import (
    DeadlineError,
    PausedError,
    ReplayError,
    StaleGenerationError,
)
from services.prompts.buffer import Buffer
from services.prompts.capture_log import CaptureLog
from services.prompts.chat import UnusablePromptError
from services.prompts.config import PromptsConfig
from services.prompts.corpus import Corpus
from services.prompts.ledger import LedgerSummary, audit, lines_of
from services.prompts.lives import ATTEMPTS_A_LIFE, count_life
from services.prompts.records import CoordinatorSettings, Progress
from services.prompts.scheduling import Schedule
from services.replay.links import link_shards

__all__ = ["Coordinator", "CoordinatorSettings", "LedgerSummary", "Progress"]

logger = logging.getLogger(__name__)

FEED_PERIOD_S = 0.05
"""How often an idle feeder looks for outcomes."""

ENCODE_AT_ONCE = 16
"""Conversations encoded between two looks at outcomes and queue."""

LEASE_WAIT_S = 1.0
"""Longest wait of one `step_lease`; the caller asks again."""

FEEDER_DEADLINE_S = 30.0
"""Longest wait for the feeder to end: one answer of Redis and one round of encoding."""

NAMED_LINES = 5
"""Rejected lines that `progress` quotes."""

REDIS_EMPTY = "Redis restarted empty"
COORDINATOR_RESTARTED = "the coordinator was restarted"
GROUP_BEGAN = "the trainer group began again after step {step}"


class Coordinator:
    """Owns the plan of uses, the ledger and the step leases of one run."""

    def __init__(
        self,
        prompts: PromptsConfig,
        model: str,
        redis_urls: str | Sequence[str],
        prefix: str,
        settings: CoordinatorSettings,
    ) -> None:
        """Load the prompts, read the ledger to resume from, and begin to feed the work queues.

        Args:
            prompts: Which conversations.
            model: Folder or hub name of the target, for its tokenizer and chat template.
            redis_urls: The Redis of each shard, with its table and work queue; a text alone is that of a single one.
            prefix: Of this run's keys in them.
            settings: How the prompts are used.

        Raises:
            PromptError: The prompts or the tokenizer cannot be read.
            CheckpointError: The ledger or the capture log is broken, or of another plan.
            ReplayUnavailableError: A Redis does not answer.
        """
        self._settings = settings
        self._corpus = Corpus(prompts, model, settings)
        self._plan = self._corpus.plan
        self._ledger = self._corpus.open_ledger(settings.ledger)
        links = link_shards(redis_urls, prefix)
        assert len(links) == settings.num_shards
        self._buffer = Buffer(links)
        self._log = CaptureLog(
            Path(settings.capture_log),
            num_captures=self._plan.num_captures,
            num_prompts=self._plan.num_prompts,
            dtype=settings.signature.dtype,
        )
        self._summary: LedgerSummary | None = None
        self._error: Exception | None = None
        self._changed = threading.Condition()
        self._feeding = threading.Lock()
        """Held while the feeder takes a turn, and by whoever makes the schedule anew."""
        self._closing = threading.Event()
        self._schedule: Schedule | None = None
        self._accounts: dict[int, RankAccount] = {}
        self._beats: dict[int, float] = {}
        """When each rank gave its last sign of life."""
        self._late_reports: list[StepReport] = []
        self._why_lost: str | None = None
        """Why there is no schedule, or why it has not all it had, while that is so."""
        if settings.joins:
            self._lose_schedule(COORDINATOR_RESTARTED)
            self._buffer.lose_all()
        else:
            with self._changed:
                self._begin_life()
        self._feeder = threading.Thread(target=self._feed, name="feeder", daemon=True)
        self._feeder.start()
        logger.info(
            "%d conversations, %d rejected; %d captures are planned",
            self._corpus.num_conversations,
            len(self._corpus.rejected),
            self._plan.num_captures,
        )

    def step_lease(self, step: int, generation: int) -> StepLease:
        """Grant an optimizer step, counted from 1; the same step again gives the same lease.

        Raises:
            DeadlineError: Too few conversations are encoded after `LEASE_WAIT_S`, or the accounts of the ranks are
                not all there: ask again.
            PausedError: The run is still paused after `LEASE_WAIT_S`: ask again.
            StaleGenerationError: Another trainer group is the current one.
            ReplayError: The step is not the next one.
            PromptError: Not one conversation can be trained on.
        """
        deadline_s = time.monotonic() + LEASE_WAIT_S
        with self._changed:
            while True:
                self._raise_error()
                self._check_generation(generation)
                lease = self._schedule.grant(step, generation) if self._schedule else None
                if lease is not None:
                    self._changed.notify_all()
                    return lease
                left_s = deadline_s - time.monotonic()
                if left_s <= 0 and self._settings.is_paused:
                    raise PausedError(f"step {step} is not granted: the run is paused")
                if left_s <= 0:
                    raise DeadlineError(f"step {step}: {self._waits_for()} after {LEASE_WAIT_S:g} s; ask again")
                self._changed.wait(left_s)

    def wanted(self, rank: int, generation: int) -> tuple[str, ...] | None:
        """Whether this rank's account is wanted: then the incarnations of the tables that its leases must be of now.

        Ranks ask a few times a second, which is also their sign of life.

        Raises:
            StaleGenerationError: Another trainer group is the current one.
        """
        with self._changed:
            self._raise_error()
            self._check_generation(generation)
            self._beats[rank] = time.monotonic()
            is_wanted = self._is_planning_anew and rank not in self._valid_accounts()
            return self._buffer.incarnations if is_wanted else None

    def join(self, account: RankAccount) -> None:
        """Take a rank's account; once all ranks have given theirs, what was lost is captured again.

        An account that was asked for under an earlier incarnation of a table does not count: it is wanted anew.

        Raises:
            StaleGenerationError: The account comes from another trainer group.
        """
        with self._changed:
            self._check_generation(account.generation)
            if self._is_planning_anew:
                self._accounts[account.rank] = account

    def begin_group(self, generation: int, ledger: str | None) -> None:
        """Grant steps to a new trainer group, from the ledger of the checkpoint that it begins from.

        Args:
            generation: Of the new group, above all before.
            ledger: Path of the ledger; None begins at step 0.

        Raises:
            CheckpointError: The ledger is broken, or of another plan.
            StaleGenerationError: The table has a newer generation.
            ReplayUnavailableError: Redis does not answer.
            TableLostError: The table is not there; try again, the shard makes it.
        """
        new_ledger = self._corpus.open_ledger(ledger)
        with self._feeding, self._changed:
            if not self._feeder.is_alive():
                self._raise_error()
            self._settings = self._settings.model_copy(
                update={"generation": generation, "ledger": ledger, "joins": False}
            )
            self._ledger = new_ledger
            self._beats.clear()
            self._error = None
            self._lose_schedule(GROUP_BEGAN.format(step=new_ledger.last_step))
            self._log_lost(self._buffer.clear_all(generation))
            self._begin_life()

    def attend(self) -> None:
        """Return once the coordinator ends; whoever waits for this learns at once that its process was killed."""
        self._closing.wait()

    def step_done(self, report: StepReport) -> None:
        """Take a rank's report of a finished step; the same report again changes nothing.

        Raises:
            StaleGenerationError: The report comes from another trainer group.
            ReplayError: It contradicts what was granted or reported.
        """
        with self._changed:
            self._check_generation(report.generation)
            if self._schedule is None:
                self._late_reports.append(report)
                return
            try:
                self._schedule.report(report)
            except ReplayError as error:  # ranks do not wait for this answer: the next one they wait for says it too
                self._error = self._error or error
                raise
            finally:
                self._changed.notify_all()

    def ledger_at(self, step: int, timeout_s: float) -> str:
        """The ledger as a checkpoint after `step` keeps it, JSON lines; the log of its captures is on disk by then.

        Raises:
            DeadlineError: Some rank has not reported the step in time, or not given its account after a loss.
        """
        deadline_s = time.monotonic() + timeout_s
        with self._changed:
            while True:
                if not self._changed.wait_for(lambda: self._is_complete_to(step), deadline_s - time.monotonic()):
                    what = f"every rank has reported step {self._ledger.last_step}, not all of them the next"
                    if self._is_planning_anew:
                        what = self._waits_for()
                    raise DeadlineError(f"the ledger of step {step} is not complete after {timeout_s:g} s: {what}")
                self._raise_error()
                if self._summary is None:  # after `finish` the log is complete and closed
                    self._drain()
                    if not self._buffer.is_known():
                        continue  # what a table had to tell is gone: the ranks' accounts tell it
                    self._log.sync()
                return self._ledger.text(step)

    def progress(self) -> Progress:
        """How far the run is.

        Raises:
            Exception: Whatever ended the feeder.
        """
        with self._changed:
            self._raise_error()
            return Progress(
                planned=self._plan.num_uses,
                trained=self._ledger.num_trained,
                skipped=dict(self._ledger.skipped),
                skip_examples=dict(self._ledger.skip_examples),
                rejected=len(self._corpus.rejected),
                rejected_lines=tuple(self._corpus.rejected[:NAMED_LINES]),
                captured=self._log.num_captured,
                recaptured=self._log.num_recaptured,
                tokens_captured=self._log.num_tokens,
                traffic=self._log.traffic,
                tokens_trained=self._ledger.num_tokens_trained,
                distinct_tokens=self._log.num_distinct_tokens,
                steps_done=self._ledger.last_step,
                steps_granted=self._schedule.steps_granted if self._schedule else self._ledger.last_step,
                ended=self._schedule.ended if self._schedule else None,
                last_failure=self._schedule.last_failure if self._schedule else None,
                silent_s={rank: time.monotonic() - beat_s for rank, beat_s in self._beats.items()},
            )

    def pause(self) -> int:
        """Grant no further step until `go_on`.

        Returns:
            The last step that is granted; the ranks still train it.

        Raises:
            DeadlineError: The ranks' accounts are not all there: which step is the last is not known yet. Ask again.
        """
        with self._changed:
            self._settings = self._settings.model_copy(update={"is_paused": True})
            if not self._changed.wait_for(lambda: self._error or self._schedule, LEASE_WAIT_S):
                raise DeadlineError(f"the run pauses, but {self._waits_for()}; ask again")
            self._raise_error()
            assert self._schedule is not None
            self._schedule.is_paused = True
            return self._schedule.steps_granted

    def go_on(self) -> None:
        """Grant steps again."""
        with self._changed:
            self._settings = self._settings.model_copy(update={"is_paused": False})
            if self._schedule:
                self._schedule.is_paused = False
            self._changed.notify_all()

    def stop_granting(self) -> None:
        """Let the ranks finish what is granted; the next step is `END`."""
        with self._changed:
            self._settings = self._settings.model_copy(update={"is_stopped": True})
            if self._schedule:
                self._schedule.stop()
            self._changed.notify_all()

    def heldout_prompts(self, count: int) -> list[HeldoutPrompt]:
        """Held-out prompts in a seeded order, each with the generation prompt; none without a source.

        Raises:
            PromptError: The held-out source cannot be read or has no usable prompt.
        """
        return self._corpus.heldout_prompts(count)

    def finish(self) -> LedgerSummary:
        """End the feeder and audit the run from its logs; a second call gives the same answer.

        Raises:
            DeadlineError: The feeder does not end.
        """
        self._closing.set()
        self._feeder.join(FEEDER_DEADLINE_S)
        if self._feeder.is_alive():
            raise DeadlineError(f"the coordinator's feeder has not ended after {FEEDER_DEADLINE_S:g} s")
        with self._changed:
            if self._summary is None:
                if self._error is None:
                    self._drain()
                self._log.close()
                ledger = self._ledger.text(self._ledger.last_step)
                self._summary = audit(lines_of(ledger), self._log.lines())
            return self._summary

    def _feed(self) -> None:
        try:
            while not self._closing.is_set():
                with self._feeding:
                    was_busy = self._feed_once()
                if not was_busy:
                    self._closing.wait(FEED_PERIOD_S)
        except Exception as error:  # whoever calls next gets it
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _feed_once(self) -> bool:
        """Feed the queues, or do what can be done now so that they can be fed again; whether there was anything to do.

        Raises:
            ReplayUnavailableError: A Redis has been away for too long.
            TableLostError: A table has.
        """
        outcomes = self._buffer.look(self._settings.generation)
        with self._changed:
            if self._buffer.lost and self._why_lost is None:
                self._note_loss(REDIS_EMPTY)
            self._log_lost(outcomes)
            if self._is_planning_anew and len(self._valid_accounts()) == self._settings.world_size:
                if self._schedule is None:
                    self._begin_life()
                else:
                    self._recapture()
        return self._schedule is not None and self._turn()

    @property
    def _is_planning_anew(self) -> bool:
        return self._schedule is None or bool(self._buffer.lost)

    def _valid_accounts(self) -> dict[int, RankAccount]:
        """Those given since all tables are what they are now."""
        incarnations = self._buffer.incarnations
        return {rank: account for rank, account in self._accounts.items() if account.incarnations == incarnations}

    def _note_loss(self, why: str) -> None:
        if self._why_lost is None:
            logger.warning("captures are planned anew: %s", why)
            self._why_lost = why

    def _lose_schedule(self, why: str) -> None:
        """What the schedule says is no longer so; again: nothing happens."""
        self._note_loss(why)
        self._schedule = None
        self._accounts.clear()

    def _begin_life(self) -> None:
        """Make the schedule anew over empty tables, from the ledger and the ranks' accounts."""
        settings, accounts = self._settings, self._take_accounts()
        schedule = Schedule(self._ledger, settings, accounts, self._why_lost)
        schedule.is_paused = settings.is_paused
        if settings.is_stopped:
            schedule.stop()
        late, self._late_reports = self._late_reports, []
        for report in late:
            if report.generation == settings.generation:
                schedule.report(report)
        self._schedule = schedule
        self._end_loss()

    def _recapture(self) -> None:
        """Have what lost shards held captured again, but for what the ranks' accounts have of it."""
        assert self._schedule is not None
        self._drain()  # before the accounts tell of the same captures
        if len(self._valid_accounts()) < self._settings.world_size:
            return  # another shard was lost just now
        self._schedule.lose(self._buffer.lost, self._take_accounts(), self._why_lost or REDIS_EMPTY)
        self._end_loss()

    def _take_accounts(self) -> list[RankAccount]:
        """The ranks' accounts, for a life that begins; what only they know to have been captured is logged."""
        accounts = self._valid_accounts()
        for note in (note for rank in sorted(accounts) for note in accounts[rank].samples):
            if not self._log.has(note.capture, note.attempt):
                self._log.append(**note.model_dump(), why_again=self._why_lost or "")
        self._log.flush()
        self._first_attempt = count_life(Path(self._settings.lives)) * ATTEMPTS_A_LIFE
        return [accounts[rank] for rank in sorted(accounts)]

    def _end_loss(self) -> None:
        self._buffer.found()
        self._accounts.clear()
        self._sealed = False
        self._why_lost = None
        self._changed.notify_all()

    def _turn(self) -> bool:
        """One look at outcomes, queues and prompts; returns whether there was anything to do."""
        assert self._schedule is not None
        with self._changed:
            num_drained = self._drain()
            routed = self._schedule.take_pushable(self._buffer.rooms(self._settings.lookahead_captures))
        for shard, job in routed:
            self._buffer.push(shard, job)
        num_encoded = 0
        while num_encoded < ENCODE_AT_ONCE and self._encode_next():
            num_encoded += 1
        with self._changed:
            if self._schedule.is_complete and not self._sealed:
                self._schedule.check_usable()
                self._sealed = self._buffer.seal()
        return bool(num_drained or routed or num_encoded)

    def _encode_next(self) -> bool:
        assert self._schedule is not None
        with self._changed:
            capture = self._schedule.next_to_encode()
            if capture is None:
                self._changed.notify_all()  # the plan may just have run out
                return False
            attempt = self._schedule.attempt(capture, at_least=self._first_attempt)
            ks = self._schedule.remaining_ks(capture)
        try:
            job = self._corpus.job(capture, attempt, ks)
        except UnusablePromptError as error:
            with self._changed:
                self._schedule.skip(capture, error.reason, error.detail)
                self._changed.notify_all()
            return True
        with self._changed:
            self._schedule.add(job)
            self._changed.notify_all()
        return True

    def _drain(self) -> int:
        outcomes = self._buffer.drain()
        if self._schedule is None:
            self._log_lost(outcomes)
            return len(outcomes)
        for outcome in outcomes:
            committed = self._schedule.on_outcome(outcome)
            if committed is not None:
                self._log.take(committed.outcome, self._prompt(committed.outcome), committed.why_again)
        if outcomes:
            self._log.flush()
        return len(outcomes)

    def _log_lost(self, outcomes: Iterable[Outcome]) -> None:
        """Log captures that were made and lost again before the schedule heard of them."""
        for outcome in outcomes:
            if outcome.kind == "committed":
                self._log.take(outcome, self._prompt(outcome), self._why_lost or "")
        self._log.flush()

    def _prompt(self, outcome: Outcome) -> int:
        prompt, _ = self._plan.capture(outcome.capture)
        return prompt

    def _is_complete_to(self, step: int) -> bool:
        if self._error is not None or self._summary is not None:
            return True
        return self._ledger.last_step >= step and not self._is_planning_anew

    def _waits_for(self) -> str:
        """What a step or a ledger waits for, in words."""
        if not self._is_planning_anew:
            return f"fewer than {self._settings.uses_per_step} uses are encoded"
        accounts = self._valid_accounts()
        missing = [str(rank) for rank in range(self._settings.world_size) if rank not in accounts]
        return f"the coordinator begins anew and waits for the accounts of rank {', '.join(missing) or '(none)'}"

    def _check_generation(self, generation: int) -> None:
        if generation != self._settings.generation:
            raise StaleGenerationError(
                f"generation {generation} is not the current one, {self._settings.generation}: "
                "this trainer group has been replaced"
            )

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error
