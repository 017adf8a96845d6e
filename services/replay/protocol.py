"""What a replay table and a work queue can do, whatever holds them.

`RedisTable` and `WorkQueue` keep everything in Redis; `MemoryTable` and `MemoryWorkQueue` in one process. They answer
alike, errors included: tests/contract holds them together.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from services.contracts import CaptureJob, LeaseName, Outcome, Sample, SampleLease, TableInfo, TableSignature
from services.replay.rate_limiter import RateLimiter
from services.replay.rules import Admission, Cleared
from services.replay.selectors import Selector
from services.replay.store import ChunkStore


class ReplayTable(ChunkStore, Protocol):
    """Samples within a byte capacity, leased to trainers, freed when they are used up.

    It passes payloads on to its chunk store: between `admit` and `commit` an attempt's chunks are written, and a lease
    permits to read them.

    A sample goes through these states, one atomic transition each:

        admit ──► inserting ──commit──► ready ──lease──► leased ──ack of the last use──► freed
                      │                   ▲                 │
                      └─abandon─► freed   └─release, expire─┘

    Law of bytes: the bytes of samples that are inserting, ready or leased sum to `resident_bytes` ≤ `capacity_bytes`.
    They are known before a capture begins (`TableSignature.reserved_bytes`) and reserved by `admit`; `commit` refuses a
    sample of which not all rows arrived, and gives back what was reserved for a longer answer than the target gave.

    A sample feeds one use for each of its job's `ks` (all k < reuse by default), lowest k first. Which sample the next
    use comes from is the selector's choice, and when one may come and go the rate limiter's. Times are passed in; they
    come from one clock (`time.time` of one host).

    Wherever it says so, `TableLostError` means that there is no table: it was never created, or Redis restarted empty.
    """

    def create(
        self,
        capacity_bytes: int,
        signature: TableSignature,
        max_times_sampled: int,
        limiter: RateLimiter | None = None,
        selector: Selector | None = None,
    ) -> None:
        """Create the table, or find that it is there with the same signature; its limits become these.

        Args:
            capacity_bytes: Most resident bytes.
            signature: What all samples share.
            max_times_sampled: Most uses that one sample may feed.
            limiter: Who waits for whom; by default nobody, except for bytes and samples.
            selector: Which sample comes next; by default the oldest.

        Raises:
            SignatureError: The table is there with another signature.
            ReplayError: The table is there and holds more bytes than the new capacity.
        """
        ...

    def incarnation(self) -> str | None:
        """Identifies this making of the table: another one means that all it held is lost. None: there is no table."""
        ...

    def generation(self) -> int | None:
        """The trainer group that may lease; None: there is no table."""
        ...

    def signature(self) -> TableSignature | None:
        """The signature that the table was created with; None: no table."""
        ...

    def admit(self, job: CaptureJob, num_bytes: int, now_s: float, *, queued: bool = False) -> Admission:
        """Reserve the bytes of a capture before it begins.

        If the job came from the work queue and its sample is here already, the job ends and an outcome `committed`
        with the reason `already resident` is written for it.

        Args:
            job: The capture.
            num_bytes: Its payload bytes, `TableSignature.reserved_bytes`.
            now_s: The time.
            queued: The job comes from the work queue, and is wanted only while it stands there.

        Raises:
            SampleTooLargeError: It needs more than the table's whole capacity.
            ReplayError: It feeds no use, or more than the table allows.
            TableLostError: There is no table.
        """
        ...

    def commit(self, sample: Sample, now_s: float) -> None:
        """Make a sample visible, whole or not at all, and write its outcome. The same commit again changes nothing.

        Args:
            sample: Its job's attempt must be the one admitted last; its chunks must be stored.
            now_s: The time.

        Raises:
            UnknownSampleError: This attempt is not being inserted.
            WireError: Rows or bytes are missing, or not those that were reserved. Nothing changes.
            TableLostError: There is no table.
        """
        ...

    def abandon(self, job: CaptureJob, outcome: Outcome) -> bool:
        """Free what an attempt reserved, end its job in the work queue, and write its outcome, in one step.

        Returns:
            Whether it was so. False changes nothing: the attempt was committed, replaced, or abandoned before.
        """
        ...

    def lease(
        self,
        *,
        rank: int,
        generation: int,
        count: int,
        now_s: float,
        lease_s: float,
        captures: Sequence[int] | None = None,
    ) -> list[SampleLease]:
        """Lease uses of committed samples, in the selector's order.

        Args:
            rank: Who leases.
            generation: Of the trainer group.
            count: How many uses; the answer is empty until so many are ready, so that micro-batches are full, and until
                the rate limiter lets them go. Once the table is sealed it may be fewer, and also where the buffer is
                full with nothing leased and nothing on its way: no ack could ever make room for the rest.
            now_s: The time.
            lease_s: The leases end by themselves this much later.
            captures: Lease exactly these instead, in this order (deterministic mode); empty until all are ready. The
                rate limiter is not asked.

        Raises:
            ReplayError: More uses than the rate limiter can always give at once.
            StaleGenerationError: The table has another generation.
            TableLostError: There is no table.
        """
        ...

    def ack(self, leases: Iterable[LeaseName], generation: int, now_s: float) -> None:
        """End leases whose samples were used; the last use of a sample frees its bytes. All of them or none.

        Raises:
            StaleGenerationError: The table has another generation.
            UnknownSampleError: A lease is not held: acked or released before, named twice, or past its deadline.
            TableLostError: There is no table.
        """
        ...

    def release(self, leases: Iterable[LeaseName], generation: int) -> None:
        """End leases whose samples were not used; the uses are ready again, in their old place. All of them or none.

        Raises:
            StaleGenerationError: The table has another generation.
            UnknownSampleError: A lease is not held.
            TableLostError: There is no table.
        """
        ...

    def update_priorities(self, rejections: Mapping[int, float]) -> int:
        """Note how much of the drafts for some captures' samples was rejected: what `prioritized` draws by.

        Saying it again changes nothing. A capture without a sample is passed over: it may have been used up.

        Args:
            rejections: By capture, 1 − the mean acceptance of what was drafted: from 0 to 1.

        Returns:
            How many of the samples are here.

        Raises:
            ValueError: A rejection is no number from 0 to 1. Nothing changes.
            TableLostError: There is no table.
        """
        ...

    def expire(self, now_s: float) -> list[int]:
        """End leases past their deadline; their uses are ready again, in their old place.

        Captures in flight have no deadline here: their job has one in the work queue, and its next attempt takes over
        the reservation.

        Returns:
            The captures whose leases ended, one entry a lease.

        Raises:
            TableLostError: There is no table.
        """
        ...

    def set_generation(self, generation: int) -> None:
        """Begin a new trainer group: all older leases end, and the table is open again if it was sealed.

        A sample that no ack has touched is ready again with all its uses. One of which a use was acked is freed with an
        outcome `failed, retry`, because the new group may have to repeat that use. The same generation again changes
        nothing.

        Raises:
            StaleGenerationError: The table has a newer generation.
            TableLostError: There is no table.
        """
        ...

    def clear(self, generation: int) -> Cleared:
        """Drop every sample, lease and job in one step, and make the table anew: all of it can be captured again.

        Args:
            generation: Of the trainer group that may lease from now on.

        Raises:
            StaleGenerationError: The table has a newer generation.
            TableLostError: There is no table.
        """
        ...

    def seal(self) -> None:
        """Say that nothing more will be inserted: a lease may then return fewer uses than it asked for.

        Raises:
            TableLostError: There is no table.
        """
        ...

    def info(self) -> TableInfo:
        """The table's state at one moment.

        Raises:
            TableLostError: There is no table.
        """
        ...

    def drain_outcomes(self) -> list[Outcome]:
        """Take what became of captures since the last call, oldest first."""
        ...

    def destroy(self) -> None:
        """Remove everything under the prefix, work queue, targets and telemetry included, but not the claim on it."""
        ...


class CaptureQueue(Protocol):
    """Captures that wait for a shard, in plan order. A taken job is leased: a shard that dies loses none."""

    def push(self, job: CaptureJob) -> bool:
        """Append a job.

        Returns:
            False if the capture is in the queue already, waiting or taken; a newer attempt then replaces the older one
            where it stands, and the answer is True.
        """
        ...

    def take(self, now_s: float, lease_s: float) -> CaptureJob | None:
        """Take the oldest waiting job, or None; it goes back unless `done` or `renew` comes within `lease_s`.

        `ReplayTable.commit` and `ReplayTable.abandon` end the job in the same transition.
        """
        ...

    def renew(self, job: CaptureJob, now_s: float, lease_s: float) -> bool:
        """Keep a taken job for another `lease_s`, and note its attempt; False if it is not taken any more."""
        ...

    def done(self, job: CaptureJob) -> bool:
        """End a job without an outcome; False if this attempt of it is not in the queue."""
        ...

    def give_back(self, job: CaptureJob) -> bool:
        """Return a taken job to the front of the queue with its next attempt, as `expire` does.

        Returns:
            False if this attempt is not taken: the job ended, waits, or was given out again.
        """
        ...

    def expire(self, now_s: float) -> list[int]:
        """Return jobs whose shard let their deadline pass to the front, in plan order, each with its next attempt.

        Returns:
            Their captures.
        """
        ...

    def size(self) -> int:
        """Number of jobs that wait."""
        ...
