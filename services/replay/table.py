"""The replay table in Redis: samples within a byte capacity, leased to trainers, freed when they are used up.

A sample goes through these states, one Lua script a transition:

    admit ──► inserting ──commit──► ready ──lease──► leased ──ack of the last use──► freed
                  │                   ▲                 │
                  └─abandon─► freed   └─release, expire─┘

Law of bytes: the bytes of samples that are inserting, ready or leased sum to `resident_bytes` ≤ `capacity_bytes`. They
are known before a capture begins (`TableSignature.reserved_bytes`) and reserved by `admit`; `commit` refuses a sample
of which not all rows arrived, and gives back what was reserved for a longer answer than the target gave.

A sample feeds one use for each of its job's `ks` (all k < reuse by default), lowest k first; after a lease it goes to
the end of the line until no use is left. Times are passed in; they come from one clock (`time.time` of one host).
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence
from enum import StrEnum
from typing import Any, NamedTuple

import redis
from typing_extensions import Buffer

from services.contracts import CaptureJob, Outcome, Sample, SampleLease, TableInfo, TableSignature
from services.errors import (
    ReplayError,
    SampleTooLargeError,
    SignatureError,
    StaleGenerationError,
    UnknownSampleError,
    WireError,
)
from services.replay.keys import destroy, table_key
from services.replay.scripts import Reply, Scripts

OUTCOMES_A_DRAIN = 1000


class Admission(StrEnum):
    """What a table answers to a capture that asks for space."""

    ADMITTED = "ADMITTED"
    """The bytes are reserved. A newer attempt of a capture in flight takes over its reservation, full or not."""

    FULL = "FULL"
    """Not now: wait until a trainer has freed enough."""

    KNOWN = "KNOWN"
    """The sample is here already, or this attempt or a newer one of it is in flight."""

    GONE = "GONE"
    """The work queue has no such job any more: nobody waits for it."""


def uses_of(job: CaptureJob) -> tuple[int, ...]:
    """The k of the uses that a capture feeds, ascending."""
    return tuple(range(job.reuse)) if job.ks is None else tuple(sorted(set(job.ks)))


def check_chunks(sample: Sample, signature: TableSignature) -> None:
    """Check that a sample's chunks are all rows of its tensors, each once and in order.

    Raises:
        WireError: Rows are missing, doubled or too many, or a chunk's bytes are not those of its rows.
    """
    job = sample.job
    tensors = (
        ("context", job.num_tokens, signature.context_row_bytes),
        ("last", len(job.last_rows), signature.last_row_bytes),
    )
    for name, num_rows, row_bytes in tensors:
        row = 0
        for chunk in sample.chunks:
            if chunk.tensor != name:
                continue
            if chunk.row_start != row or chunk.num_bytes != (chunk.row_end - chunk.row_start) * row_bytes:
                raise WireError(
                    f"capture {job.capture}: a chunk of {name} has rows {chunk.row_start} to {chunk.row_end} in "
                    f"{chunk.num_bytes} bytes where row {row} was due at {row_bytes} bytes a row"
                )
            row = chunk.row_end
        if row != num_rows:
            raise WireError(f"capture {job.capture}: {row} rows of {name} came, {num_rows} are needed")


class Cleared(NamedTuple):
    """What `RedisTable.clear` leaves behind."""

    incarnation: str
    """Of the table made anew."""
    outcomes: list[Outcome]
    """Those that nobody had drained."""


class RedisTable:
    """One replay table under one prefix of one Redis."""

    def __init__(self, client: redis.Redis, prefix: str) -> None:
        """Attach to a table.

        Args:
            client: From `connect`.
            prefix: Of all its keys.
        """
        self._client = client
        self._prefix = prefix
        self._scripts = Scripts(client, prefix)

    def create(self, capacity_bytes: int, signature: TableSignature, max_times_sampled: int) -> None:
        """Create the table, or find that it is there with the same signature; its limits become these.

        Args:
            capacity_bytes: Most resident bytes.
            signature: What all samples share.
            max_times_sampled: Most uses that one sample may feed.

        Raises:
            SignatureError: The table is there with another signature.
            ReplayError: The table is there and holds more bytes than the new capacity.
        """
        status, rest = self._scripts.run(
            "create", signature.model_dump_json(), capacity_bytes, max_times_sampled, secrets.token_hex(4)
        )
        if status == "SIGNATURE":
            raise SignatureError(
                f"the replay table {self._prefix!r} holds samples of {rest[0].decode()}, not of "
                f"{signature.model_dump_json()}. Give this run another name, or end the run that uses the table."
            )
        if status == "SHRUNK":
            raise ReplayError(
                f"the replay table {self._prefix!r} holds {int(rest[0])} bytes, more than the new capacity of "
                f"{capacity_bytes}. Keep replay.capacity or wait until the samples are used."
            )

    def incarnation(self) -> str | None:
        """Identifies this making of the table: another one means that all it held is lost. None: there is no table."""
        text: Any = self._client.hget(table_key(self._prefix), "incarnation")
        return None if text is None else text.decode()

    def generation(self) -> int | None:
        """The trainer group that may lease; None: there is no table."""
        text: Any = self._client.hget(table_key(self._prefix), "generation")
        return None if text is None else int(text)

    def signature(self) -> TableSignature | None:
        """The signature that the table was created with; None: no table."""
        text: Any = self._client.hget(table_key(self._prefix), "signature")
        return None if text is None else TableSignature.model_validate_json(text)

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
        uses = uses_of(job)
        if not uses or num_bytes <= 0:
            raise ReplayError(
                f"capture {job.capture} feeds {len(uses)} uses with {num_bytes} bytes; both must be positive"
            )
        outcome = Outcome(
            capture=job.capture,
            attempt=job.attempt,
            kind="committed",
            num_tokens=job.num_tokens,
            num_bytes=num_bytes,
            reason="already resident",
        )
        status, rest = self._scripts.run(
            "admit", job.capture, job.attempt, num_bytes, len(uses), now_s, outcome.model_dump_json(), int(queued)
        )
        if status == "TOO_LARGE":
            raise SampleTooLargeError(
                f"capture {job.capture} with {job.num_tokens} tokens needs {num_bytes} bytes, the whole replay buffer "
                f"holds {int(rest[0])}. Raise replay.capacity or lower prompts.max_length."
            )
        if status == "USES":
            raise ReplayError(
                f"capture {job.capture} feeds {len(uses)} uses, the table allows {int(rest[0])}: replay.reuse differs "
                "between the coordinator and the shard"
            )
        return Admission(status)

    def put_chunk(self, job: CaptureJob, index: int, payload: Buffer) -> None:
        """Store one chunk of an admitted capture; the same chunk again replaces the first.

        Args:
            job: The capture; its attempt must be the one admitted last.
            index: Number of the chunk within the sample, ascending.
            payload: Its bytes, not kept after the call.

        Raises:
            UnknownSampleError: This attempt is not being inserted: abandoned, replaced, or committed.
            WireError: More bytes than were reserved, or a chunk before it is missing.
        """
        view = memoryview(payload).cast("B")
        status, rest = self._scripts.run("place", job.capture, job.attempt, index, view.nbytes)
        if status == "OVERFLOW":
            raise WireError(
                f"capture {job.capture}: chunk {index} brings it to {int(rest[0])} bytes, {int(rest[1])} are reserved"
            )
        if status == "GAP":
            raise WireError(f"capture {job.capture}: chunk {index} came where chunk {int(rest[0])} was due")
        if status == "STALE" or not self._client.set(rest[0], view, xx=True):
            raise self._stale(job, rest if status == "STALE" else [b"gone", b""])

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
        job = sample.job
        signature = self.signature()
        if signature is not None:
            check_chunks(sample, signature)
        outcome = Outcome(
            capture=job.capture,
            attempt=job.attempt,
            kind="committed",
            num_tokens=job.num_tokens,
            num_bytes=sample.num_bytes,
        )
        sizes = [chunk.num_bytes for chunk in sample.chunks]
        status, rest = self._scripts.run(
            "commit",
            job.capture,
            job.attempt,
            sample.num_bytes,
            now_s,
            sample.model_dump_json(),
            outcome.model_dump_json(),
            len(sizes),
            *sizes,
            *uses_of(job),
        )
        if status == "STALE":
            raise self._stale(job, rest)
        if status == "BYTES":
            raise WireError(
                f"capture {job.capture}: {int(rest[0])} bytes were to be committed, {int(rest[1])} are reserved"
            )
        if status == "CHUNKS":
            raise WireError(
                f"capture {job.capture}: {int(rest[0])} chunks are stored, {len(sizes)} were to be committed"
            )
        if status == "SIZE":
            raise WireError(
                f"capture {job.capture}: chunk {int(rest[0])} has {int(rest[1])} bytes in Redis, "
                f"{int(rest[2])} were sent"
            )

    def abandon(self, job: CaptureJob, outcome: Outcome) -> bool:
        """Free what an attempt reserved, end its job in the work queue, and write its outcome, in one step.

        Returns:
            Whether it was so. False changes nothing: the attempt was committed, replaced, or abandoned before.
        """
        status, _ = self._scripts.run("abandon", job.capture, job.attempt, outcome.model_dump_json())
        return status == "OK"

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
        """Lease uses of committed samples, oldest sample first.

        Args:
            rank: Who leases.
            generation: Of the trainer group.
            count: How many uses; the answer is empty until so many are ready, so that micro-batches are full. Once the
                table is sealed it may be fewer.
            now_s: The time.
            lease_s: The leases end by themselves this much later.
            captures: Lease exactly these instead, in this order (deterministic mode); empty until all are ready.

        Raises:
            StaleGenerationError: The table has another generation.
            TableLostError: There is no table.
        """
        if captures is not None and len(captures) == 0:
            return []
        status, rest = self._scripts.run("lease", rank, generation, count, now_s + lease_s, *(captures or ()))
        self._check_generation(status, rest, generation)
        leases = []
        for lease_id, k, record in zip(rest[0::3], rest[1::3], rest[2::3], strict=True):
            sample = Sample.model_validate_json(record)
            use = sample.job.capture * sample.job.reuse + int(k)
            leases.append(SampleLease(lease_id=lease_id.decode(), use=use, k=int(k), sample=sample))
        return leases

    def ack(self, leases: Iterable[SampleLease], generation: int, now_s: float) -> None:
        """End leases whose samples were used; the last use of a sample frees its bytes. All of them or none.

        Raises:
            StaleGenerationError: The table has another generation.
            UnknownSampleError: A lease is not held: acked or released before, named twice, or past its deadline.
            TableLostError: There is no table.
        """
        ids = [lease.lease_id for lease in leases]
        status, rest = self._scripts.run("ack", generation, now_s, *ids)
        self._check_held(status, rest, generation)
        if status == "OVERDUE":
            raise UnknownSampleError(
                f"lease {rest[0].decode()} ended {now_s - float(rest[1]):.1f} s before its ack: its sample goes to "
                "another reader. Raise replay.lease_s above the time a trainer holds a sample."
            )

    def release(self, leases: Iterable[SampleLease], generation: int) -> None:
        """End leases whose samples were not used; the uses are ready again, in their old place. All of them or none.

        Raises:
            StaleGenerationError: The table has another generation.
            UnknownSampleError: A lease is not held.
            TableLostError: There is no table.
        """
        status, rest = self._scripts.run("release", generation, *(lease.lease_id for lease in leases))
        self._check_held(status, rest, generation)

    def expire(self, now_s: float) -> list[int]:
        """End leases past their deadline; their uses are ready again, in their old place.

        Captures in flight have no deadline here: their job has one in the work queue, and its next attempt takes over
        the reservation.

        Returns:
            The captures whose leases ended, one entry a lease.
        """
        _, rest = self._scripts.run("expire", now_s)
        return [int(capture) for capture in rest]

    def set_generation(self, generation: int) -> None:
        """Begin a new trainer group: all older leases end, and the table is open again if it was sealed.

        A sample that no ack has touched is ready again with all its uses. One of which a use was acked is freed with an
        outcome `failed, retry`, because the new group may have to repeat that use. The same generation again changes
        nothing.

        Raises:
            StaleGenerationError: The table has a newer generation.
            TableLostError: There is no table.
        """
        status, rest = self._scripts.run("set_generation", generation)
        self._check_generation(status, rest, generation)

    def clear(self, generation: int) -> Cleared:
        """Drop every sample, lease and job in one step, and make the table anew: all of it can be captured again.

        Args:
            generation: Of the trainer group that may lease from now on.

        Raises:
            StaleGenerationError: The table has a newer generation.
            TableLostError: There is no table.
        """
        incarnation = secrets.token_hex(4)
        status, rest = self._scripts.run("clear", generation, incarnation)
        self._check_generation(status, rest, generation)
        return Cleared(incarnation, [Outcome.model_validate_json(text) for text in rest])

    def seal(self) -> None:
        """Say that nothing more will be inserted: a lease may then return fewer uses than it asked for."""
        self._scripts.run("seal")

    def info(self) -> TableInfo:
        """The table's state at one moment.

        Raises:
            TableLostError: There is no table.
        """
        _, rest = self._scripts.run("info")
        resident, peak, capacity, inserts, samples, deletes, sealed, ready, leased, inserting = map(int, rest)
        return TableInfo(
            resident_bytes=resident,
            peak_bytes=peak,
            capacity_bytes=capacity,
            num_ready=ready,
            num_leased=leased,
            num_inserting=inserting,
            inserts=inserts,
            samples=samples,
            deletes=deletes,
            sealed=bool(sealed),
        )

    def drain_outcomes(self) -> list[Outcome]:
        """Take what became of captures since the last call, oldest first."""
        outcomes: list[Outcome] = []
        while True:
            batch: Any = self._client.lpop(f"{self._prefix}:outcomes", OUTCOMES_A_DRAIN) or []
            outcomes.extend(Outcome.model_validate_json(text) for text in batch)
            if len(batch) < OUTCOMES_A_DRAIN:
                return outcomes

    def destroy(self) -> None:
        """Remove every key under the prefix, work queue, targets and telemetry included, but not the claim on it."""
        destroy(self._client, self._prefix, keep_claim=True)

    @staticmethod
    def _stale(job: CaptureJob, rest: Reply) -> UnknownSampleError:
        state, attempt = (bytes(part).decode() for part in rest)
        now = f"it is {state} with attempt {attempt}" if attempt else "it was abandoned or never admitted"
        return UnknownSampleError(f"attempt {job.attempt} of capture {job.capture} is not being inserted: {now}")

    def _check_generation(self, status: str, rest: Reply, generation: int) -> None:
        if status == "STALE":
            raise StaleGenerationError(
                f"generation {generation} is not the current one of the replay table {self._prefix!r}, "
                f"{int(rest[0])}: this trainer group has been replaced"
            )

    def _check_held(self, status: str, rest: Reply, generation: int) -> None:
        self._check_generation(status, rest, generation)
        if status == "UNKNOWN":
            raise UnknownSampleError(
                f"lease {rest[0].decode()} is not held: acked or released before, named twice, or past its deadline"
            )
