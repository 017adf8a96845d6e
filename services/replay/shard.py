"""The replay shard: takes jobs in plan order, reserves their bytes, pulls their features from any live target.

One dispatcher takes jobs from the work queue and admits them one after another; it waits at the head of the line while
the buffer is full, so later captures can never take the space that the next one needs. Threads then pull the admitted
captures. A capture whose target fails keeps its reservation and its thread and goes to another target with the next
attempt, so it never waits behind a full buffer that only it could empty.
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

from services.answers import AnswerWriter
from services.contracts import CaptureJob, Chunk, Outcome, Record, Sample, TableSignature
from services.errors import (
    FeatureError,
    ReplayUnavailableError,
    SampleTooLargeError,
    SignatureError,
    SlipstreamError,
    StaleGenerationError,
    TableLostError,
    TargetError,
    TargetUnavailableError,
    UnknownSampleError,
    WireError,
)
from services.memory import keep_freed_memory
from services.replay.arrival import check_arrival
from services.replay.config import ReplayConfig
from services.replay.connect import connect
from services.replay.quarantine import Fault, Judge, Verdict, fault_of
from services.replay.registry import TargetRegistry
from services.replay.table import Admission, RedisTable
from services.replay.targets import CaptureClient, Targets
from services.replay.tiers import chunk_store
from services.replay.work import WorkQueue
from services.security import Credentials
from services.telemetry import TelemetryWriter

logger = logging.getLogger(__name__)

IDLE_POLL_S = 0.01
FULL_POLL_S = 0.01
TARGET_POLL_S = 0.05
HOUSEKEEPING_S = 1.0

TARGET_MAX_AGE_S = 10.0
"""A target that the driver's watcher has not seen for so long is not asked."""

SHUN_S = 1.0
"""A capture goes back to a target that failed it so much later, if there is no other: in the meantime captures of other
prompts may show whether the target is well."""

RECONNECT_S = 180.0
"""How long Redis may be away. An embedded one is back within a second; but where its supervisor was killed too, a busy
machine takes most of a minute to start both."""

RESTARTED_EMPTY = "empty: what it held is captured again"

STORED_VALUE_OVERHEAD_BYTES = 64
"""Redis' header of a value. A payload of a whole power of two would spill into the allocator's next size class."""


class ShardStats(Record):
    """A shard's counters since it began."""

    num_captured: int = 0
    num_failed: int = 0
    num_retries: int = 0
    num_tokens: int = 0
    num_bytes: int = 0
    num_in_flight: int = 0
    full_wait_s: float = 0.0
    """Time that the head of the line has waited for space."""


class ReplayShard:
    """Fills one table. `run` blocks until `stop`; `stats` and `stop` may be called from other threads."""

    def __init__(
        self,
        redis_url: str,
        prefix: str,
        config: ReplayConfig,
        signature: TableSignature,
        answers: Path | None = None,
        credentials: Credentials | None = None,
        control_url: str | None = None,
        *,
        connect_target: Callable[[str], CaptureClient] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Connect to Redis.

        Args:
            redis_url: Where table, work queue and target registry are.
            prefix: Of their keys.
            config: Capacity, chunk size, number of pulls, reuse, lease time.
            signature: What the table holds.
            answers: Where the target's own answers go; needed only for jobs that let it answer.
            credentials: Of the run's targets; None for targets on the loopback interface that ask for none.
            control_url: Where telemetry goes; None: to `redis_url`.
            connect_target: Makes a target's client; gRPC by default.
            clock: Seconds, shared with whoever leases from the table.

        Raises:
            ReplayUnavailableError: Redis does not answer.
        """
        keep_freed_memory()
        client = connect(redis_url)
        self._config = config
        self._signature = signature
        self._clock = clock
        self._stop = threading.Event()
        chunks = chunk_store(client, prefix, tell=lambda text: self._event("arena", text), stopping=self._stop)
        self._table = RedisTable(client, prefix, chunks=chunks)
        self._work = WorkQueue(client, prefix)
        self._registry = TargetRegistry(client, prefix)
        self._telemetry = TelemetryWriter(connect(control_url) if control_url else client, prefix)
        self._answers = AnswerWriter(answers) if answers else None
        self._targets = Targets(signature, connect_target or partial(_connect_grpc, credentials))
        self._judge = Judge()
        self._slots = threading.Semaphore(config.pulls)
        self._lock = threading.Lock()
        self._in_flight: dict[object, CaptureJob] = {}
        self._stats = ShardStats()
        self._defect: BaseException | None = None
        self._generation = 0
        self._next_housekeeping_s = 0.0
        self._next_complaint_s = 0.0

    def run(self) -> None:
        """Fill the table until `stop`.

        Jobs that an earlier shard under this prefix had taken go back to the front of the queue first. The driver makes
        the tables of a run before its shards: where there is none, Redis restarted empty while no shard was there.

        Raises:
            SignatureError: The table holds something else.
            ReplayUnavailableError: Redis stayed away for `RECONNECT_S`.
        """
        if self._attach():
            self._event("redis", f"Redis is back, {RESTARTED_EMPTY}")
        pool = ThreadPoolExecutor(self._config.pulls, thread_name_prefix="pull")
        try:
            while not self._stop.is_set():
                if self._defect is not None:
                    raise self._defect
                try:
                    self._dispatch_one(pool)
                except (ReplayUnavailableError, TableLostError) as error:
                    self._reattach(error)
        finally:
            self._stop.set()
            self._targets.close()
            pool.shutdown(wait=True)
            self._table.close()
            self._telemetry.close()
            if self._answers:
                self._answers.close()
        if self._defect is not None:
            raise self._defect

    def stop(self) -> None:
        """End `run` soon; captures in flight are cut off and stay in the work queue as taken."""
        self._stop.set()
        self._targets.close()

    def stats(self) -> ShardStats:
        """The counters so far."""
        with self._lock:
            return self._stats.model_copy(update={"num_in_flight": len(self._in_flight)})

    def _attach(self) -> bool:
        """See to it that there is a table; whether there was none."""
        is_lost = self._table.incarnation() is None
        self._table.create(
            self._config.capacity,
            self._signature,
            self._config.reuse,
            self._config.rate_limiter,
            self._config.sampling,
        )
        # A Redis that restarted empty has forgotten which trainer group is the current one.
        self._generation = max(self._generation, self._table.generation() or 0)
        with contextlib.suppress(StaleGenerationError):  # a newer group began just now
            self._table.set_generation(self._generation)
        self._work.expire(math.inf)
        return is_lost

    def _reattach(self, cause: ReplayUnavailableError | TableLostError) -> None:
        """Wait until Redis is back, and make the table anew if it came back empty."""
        logger.warning("the replay buffer is away: %s", cause)
        began = time.monotonic()
        while not self._stop.wait(TARGET_POLL_S):
            try:
                is_lost = self._attach()
            except (ReplayUnavailableError, TableLostError):
                if time.monotonic() > began + RECONNECT_S:
                    raise
                continue
            what = RESTARTED_EMPTY if is_lost else "with all it held"
            self._event("redis", f"Redis is back after {time.monotonic() - began:.1f} s, {what}")
            return

    def _dispatch_one(self, pool: ThreadPoolExecutor) -> None:
        self._keep_house()
        if not self._slots.acquire(timeout=IDLE_POLL_S):
            return
        handed_over = False
        try:
            job = self._work.take(self._clock(), self._config.lease_s)
            if job is None:
                self._stop.wait(IDLE_POLL_S)
                return
            if not self._admit(job):
                return
            # Not by capture: after Redis was away, two attempts of one capture may be pulled for a while.
            pull = object()
            with self._lock:
                self._in_flight[pull] = job
            pool.submit(self._pull, pull).add_done_callback(lambda future: self._pulled(pull, future))
            handed_over = True
        finally:
            if not handed_over:
                self._slots.release()

    def _admit(self, job: CaptureJob) -> bool:
        """Reserve the job's bytes, waiting while the buffer is full; False if there is nothing to pull."""
        num_bytes = self._signature.reserved_bytes(job)
        began = time.monotonic()
        while not self._stop.is_set():
            try:
                admission = self._table.admit(job, num_bytes, self._clock(), queued=True)
            except SampleTooLargeError as error:
                self._fail(job, str(error))
                return False
            if admission is not Admission.FULL:
                self._count(full_wait_s=time.monotonic() - began)
                # KNOWN: it is resident, and its job has ended; or a newer attempt is in flight and renews the job.
                return admission is Admission.ADMITTED
            if self._defect is not None:
                return False
            self._keep_house(job)
            self._stop.wait(FULL_POLL_S)
        return False

    def _keep_house(self, head: CaptureJob | None = None) -> None:
        """Once a second: renew what this shard holds, return what others let lapse."""
        now_s = self._clock()
        if now_s < self._next_housekeeping_s:
            return
        self._next_housekeeping_s = now_s + HOUSEKEEPING_S
        self._generation = max(self._generation, self._table.generation() or 0)
        with self._lock:
            held = list(self._in_flight.values())
        for job in [*held, *([head] if head else [])]:
            self._work.renew(job, now_s, self._config.lease_s)
        self._work.expire(now_s)
        published = self._registry.published(now_s, TARGET_MAX_AGE_S)
        self._targets.forget_all_but(published)
        self._judge.forget_all_but(published)
        for address, reason in self._judge.quarantined().items():
            self._registry.quarantine(address, reason)  # a Redis that restarted empty has forgotten it
        for capture in self._table.expire(now_s):
            self._event("lease", f"the lease of capture {capture} ended unused; its sample is ready again")

    def _pulled(self, pull: object, future: Future[None]) -> None:
        with self._lock:
            job = self._in_flight.pop(pull)
        self._slots.release()
        error = future.exception()
        if isinstance(error, ReplayUnavailableError | TableLostError):
            # Where Redis is still away the dispatcher meets it too, and takes back whatever is taken.
            with contextlib.suppress(ReplayUnavailableError):
                self._work.give_back(job)
        elif error is not None:
            self._defect = error

    def _pull(self, pull: object) -> None:
        with self._lock:
            job = self._in_flight[pull]
        try:
            self._pull_from_any(pull, job)
        finally:
            self._judge.ended(job.capture)

    def _pull_from_any(self, pull: object, job: CaptureJob) -> None:
        """Try targets until the capture is made, is found to be at fault itself, or is somebody else's."""
        shunned_until_s: dict[str, float] = {}
        while (address := self._wait_for_target(shunned_until_s)) is not None:
            try:
                sample = self._capture(address, job)
                if sample is None:
                    return
                self._table.commit(sample, self._clock())
            except UnknownSampleError:
                return  # a newer attempt has this capture
            except (SignatureError, TargetError, WireError, FeatureError) as error:
                if self._stop.is_set():
                    return
                fault = fault_of(error)
                if fault is None:
                    self._targets.busy(address, self._clock())
                    continue
                shunned_until_s[address] = self._clock() + SHUN_S
                verdict = self._blame(address, job, fault, error)
            else:
                self._targets.succeeded(address)
                self._count(num_captured=1, num_tokens=sample.job.num_tokens, num_bytes=sample.num_bytes)
                self._carry_out(self._judge.good(address, job.capture), address)
                return
            finally:
                self._targets.leave(address)
            if verdict.skip is not None:
                self._fail(job, verdict.skip)
                return
            job = job.model_copy(update={"attempt": job.attempt + 1})
            if not self._retry(pull, job):
                return

    def _blame(self, address: str, job: CaptureJob, fault: Fault, error: SlipstreamError) -> Verdict:
        """Have a fault judged, and see to it that a target found guilty is asked no more."""
        now_s = self._clock()
        is_new = self._targets.failed(address, now_s) if isinstance(error, TargetUnavailableError) else True
        verdict = self._judge.fault(
            address,
            job.capture,
            fault,
            str(error),
            now_s,
            num_live=len(self._live()),
            against_target=is_new or fault is not Fault.GONE,  # captures fall together with their target
        )
        if verdict.skip is None and is_new:
            self._event("target", f"capture {job.capture} goes to another try: {error}")
        self._carry_out(verdict, address)
        return verdict

    def _carry_out(self, verdict: Verdict, address: str) -> None:
        if verdict.quarantine is not None:
            address = verdict.address or address
            logger.warning("target %s is quarantined: %s", address, verdict.quarantine)
            self._registry.quarantine(address, verdict.quarantine)

    def _retry(self, pull: object, job: CaptureJob) -> bool:
        """Take over the space of the attempt before; False if the capture is somebody else's now."""
        with self._lock:
            self._in_flight[pull] = job
        # The queue hears of the attempt first: whoever takes the job after this shard died counts on from there.
        if not self._work.renew(job, self._clock(), self._config.lease_s):
            return False
        self._count(num_retries=1)
        num_bytes = self._signature.reserved_bytes(job)
        return self._table.admit(job, num_bytes, self._clock(), queued=True) is Admission.ADMITTED

    def _live(self) -> list[str]:
        return self._registry.live(self._clock(), TARGET_MAX_AGE_S)

    def _wait_for_target(self, shunned_until_s: Mapping[str, float]) -> str | None:
        """A place at a live target; None when stopped.

        There is no other end to it: a capture is not to blame for the lack of a target. The driver ends the run if no
        target can come back, and a trainer that gets no samples says so after `trainer.wait_s`.
        """
        complain_s = self._clock() + self._config.lease_s
        while not self._stop.is_set():
            now_s = self._clock()
            address = self._targets.choose(self._live(), now_s, shunned_until_s)
            if address is not None:
                return address
            if now_s >= complain_s:
                self._complain(now_s)
            self._stop.wait(TARGET_POLL_S)
        return None

    def _complain(self, now_s: float) -> None:
        """Say, for all captures that wait together, that there is no target."""
        with self._lock:
            is_due = now_s >= self._next_complaint_s
            if is_due:
                self._next_complaint_s = now_s + self._config.lease_s
        if is_due:
            self._event("target", f"no target has served for {self._config.lease_s:g} s; the captures wait for one")

    def _capture(self, address: str, job: CaptureJob) -> Sample | None:
        """Pull one capture and store its chunks; each is checked before it is stored (`check_arrival`).

        Returns:
            None if the target's own answer is too short to be of use; it is on disk, and the coordinator hears of it.
        """
        chunks: list[Chunk] = []
        known = job

        def take_answer(answer: Sequence[int]) -> None:
            nonlocal known
            known = job.answered(answer)

        first_chunk_s, progress_s = self._config.patience_s
        stream = self._targets.client(address).capture(
            job,
            layer_ids=self._signature.layer_ids,
            wire_dtype=self._signature.dtype,
            chunk_bytes=self._chunk_bytes(),
            timeout_s=self._config.lease_s,
            first_chunk_s=self._config.lease_s if job.generate else first_chunk_s,  # the whole answer comes first
            progress_s=progress_s,
            on_answer=take_answer,
        )
        with self._table.writing(job) as writer:
            for chunk, payload in stream:
                if self._stop.is_set():
                    raise TargetUnavailableError("the shard is stopping")
                check_arrival(chunk, payload, self._signature)
                writer.write(len(chunks), payload)
                chunks.append(chunk)
        if job.generate is not None:
            answer = known.input_ids[job.num_tokens :]
            assert self._answers is not None, "a job that lets the target answer needs a file for the answers"
            self._answers.append(job.prompt, answer)  # not before all of its features were found good
            if len(answer) < job.generate.min_new_tokens:
                self._abandon(job, f"the target's answer has only {len(answer)} tokens", retry=True)
                return None
        num_bytes = sum(chunk.num_bytes for chunk in chunks)
        return Sample(job=known, chunks=tuple(chunks), num_bytes=num_bytes, target=address)

    def _chunk_bytes(self) -> int:
        rounded = self._config.chunk - STORED_VALUE_OVERHEAD_BYTES
        return rounded if rounded >= self._signature.context_row_bytes else int(self._config.chunk)

    def _fail(self, job: CaptureJob, reason: str, *, retry: bool = False) -> None:
        if self._abandon(job, reason, retry=retry):
            self._event("capture", f"capture {job.capture} failed: {reason}")

    def _abandon(self, job: CaptureJob, reason: str, *, retry: bool) -> bool:
        """Give the job up and its bytes back; False if it is somebody else's by now."""
        outcome = Outcome(
            capture=job.capture,
            attempt=job.attempt,
            kind="failed",
            num_tokens=job.num_tokens,
            retry=retry,
            reason=reason,
        )
        is_ours = self._table.abandon(job, outcome)
        self._count(num_failed=int(is_ours))
        return is_ours

    def _event(self, kind: str, message: str) -> None:
        logger.warning("%s: %s", kind, message)
        self._telemetry.emit("event", event=kind, message=message)

    def _count(self, **more: float) -> None:
        with self._lock:
            self._stats = self._stats.model_copy(
                update={name: getattr(self._stats, name) + value for name, value in more.items()}
            )


def _connect_grpc(credentials: Credentials | None, address: str) -> CaptureClient:
    from services.target.client import run_client  # tests and synthetic producers need no gRPC

    return run_client(address, credentials)
