"""Room for samples that producers bring: reserved in the order in which they ask, given back whatever happens to them.

The service is the only one to insert under its prefix. For as long as a sample is on its way, its job stands as taken
in the work queue, so that the law of `services.replay.audit` holds at every moment, and a service that begins anew
finds what an earlier one left half-done.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from services.contracts import CaptureJob, Outcome, Sample, TableSignature
from services.errors import ReplayError, TableLostError, UnknownSampleError
from services.replay.connect import Client
from services.replay.keys import inserting_key, jobs_key, sample_key
from services.replay.recent import RecentCommits
from services.replay.rules import Admission
from services.replay.table import RedisTable
from services.replay.work import WorkQueue

logger = logging.getLogger(__name__)

NEVER_S = 1e12
"""Nobody else may take a job of the service's: it ends with its stream."""


class Held:
    """A sample that has a place in line, then room in the table; from `Intake.hold`.

    Attributes:
        job: With its attempt.
    """

    def __init__(self, intake: Intake, job: CaptureJob) -> None:
        self.job = job
        self.is_committed = False
        self._intake = intake

    def admit(self) -> Admission:
        """Try to reserve the sample's bytes; FULL also while others are first in line.

        Raises:
            SampleTooLargeError: It needs more than the whole table.
            UnknownSampleError: Another stream has begun the same sample since.
            TableLostError: There is no table.
        """
        return self._intake.admit(self)

    def commit(self, sample: Sample) -> None:
        """Make the sample visible.

        Raises:
            UnknownSampleError: Another stream has begun the same sample since.
            WireError: Rows are missing.
        """
        self._intake.table.commit(sample, self._intake.clock())
        self.is_committed = True


class Intake:
    """Who may insert next. Threads share it.

    Attributes:
        table: Where the samples go.
        recent: The commits that are remembered.
        clock: Seconds.
    """

    def __init__(self, client: Client, prefix: str, signature: TableSignature, clock: Callable[[], float]) -> None:
        self.table = RedisTable(client, prefix)
        self.recent = RecentCommits(client, prefix)
        self.clock = clock
        self._client = client
        self._prefix = prefix
        self._inserting, self._jobs = inserting_key(prefix), jobs_key(prefix)
        self._signature = signature
        self._work = WorkQueue(client, prefix)
        self._queueing = threading.Lock()
        self._lock = threading.Lock()
        self._attempts = itertools.count()
        self._line: deque[Held] = deque()
        self._admitted: dict[int, Held] = {}
        self._lost: list[CaptureJob] = []
        """Samples that nobody could abandon because Redis refused."""

    @contextlib.contextmanager
    def hold(self, job: CaptureJob) -> Iterator[Held]:
        """Take a place in line for a sample. Unless it is committed, the end of the context gives everything back."""
        held = Held(self, job.model_copy(update={"attempt": next(self._attempts)}))
        with self._lock:
            self._line.append(held)
        try:
            self._enqueue(held.job)
            yield held
        finally:
            with self._lock:
                with contextlib.suppress(ValueError):
                    self._line.remove(held)
                if self._admitted.get(job.capture) is held:
                    del self._admitted[job.capture]
            if not held.is_committed:
                self._abandon(held.job)

    def admit(self, held: Held) -> Admission:
        """As `Held.admit`."""
        job = held.job
        with self._lock:
            # A sample that is on its way already takes over its own room: it must not wait behind others.
            if self._line[0] is not held and job.capture not in self._admitted:
                return Admission.FULL
        admission = self.table.admit(job, self._signature.reserved_bytes(job), self.clock(), queued=True)
        if admission is Admission.GONE:
            # An older stream of the same sample has ended, and the job with it; or a newer one has begun.
            if not self._enqueue(job):
                raise UnknownSampleError(
                    f"sample {job.capture} was begun again in another stream, which goes on with it"
                )
            return Admission.FULL
        if admission is not Admission.FULL:
            with self._lock:
                self._line.remove(held)
                if admission is Admission.ADMITTED:
                    self._admitted[job.capture] = held
        return admission

    def adopt(self) -> int:
        """Free what an earlier service left half-done; its producers send it again.

        Returns:
            How many samples.
        """
        # Not by the audit's snapshot: that lists all keys, which a user of few rights may not.
        inserting: Any = self._client.smembers(self._inserting)
        entries: Any = self._client.hgetall(self._jobs)
        in_flight = {int(capture): self._attempt(int(capture)) for capture in inserting}
        jobs = {int(capture): int(entry.partition(b" ")[0]) for capture, entry in entries.items()}
        for capture, attempt in (jobs | in_flight).items():
            self._abandon(_nameless(capture, attempt))
        for capture, attempt in jobs.items():  # of samples that are committed
            self._work.done(_nameless(capture, attempt))
        return len(jobs | in_flight)

    def _attempt(self, capture: int) -> int:
        text: Any = self._client.hget(sample_key(self._prefix, capture), "attempt")
        return int(text)

    def keep_house(self) -> None:
        """Free what could not be freed before, and forget the oldest commits."""
        with self._lock:
            lost, self._lost = self._lost, []
        for job in lost:
            self._abandon(job)
        self.recent.trim()

    def _enqueue(self, job: CaptureJob) -> bool:
        """Put the job into the work queue and take it out again, as taken: nothing else stands there.

        Returns:
            False if a newer attempt is there.
        """
        with self._queueing:
            if not self._work.push(job):
                return False
            self._work.take(self.clock(), NEVER_S)
            return True

    def _abandon(self, job: CaptureJob) -> None:
        reason = "its producer went away, or sent what it should not"
        outcome = Outcome(capture=job.capture, attempt=job.attempt, kind="failed", retry=True, reason=reason)
        try:
            self.table.abandon(job, outcome)
        except TableLostError:
            return  # and the sample with it
        except ReplayError as error:  # Redis is away, or at its maxmemory
            logger.warning("sample %d is to be freed yet: %s", job.capture, error)
            with self._lock:
                self._lost.append(job)


def _nameless(capture: int, attempt: int) -> CaptureJob:
    """A job of which nothing but its name is known any more."""
    return CaptureJob(capture=capture, attempt=attempt, prompt=0, epoch=0, input_ids=(), loss_mask=(), last_rows=())
