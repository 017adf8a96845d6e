"""The replay table in Redis (`ReplayTable` says what a table does): one Lua script a transition."""

from __future__ import annotations

import math
import random
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from typing_extensions import Buffer, override

from services.contracts import CaptureJob, LeaseName, Outcome, Sample, SampleLease, TableInfo, TableSignature
from services.replay import refusals
from services.replay.connect import Client
from services.replay.keys import destroy, table_key
from services.replay.protocol import ReplayTable
from services.replay.rate_limiter import LimiterState, RateLimiter
from services.replay.rules import Admission, Cleared, check_chunks, committed, resident_already, uses_of
from services.replay.scripts import Reply, Scripts
from services.replay.selectors import Selector, priorities
from services.replay.store import ChunkReader, ChunkStore, ChunkWriter
from services.replay.tiers import chunk_store

__all__ = ["Admission", "Cleared", "RedisTable"]

OUTCOMES_A_DRAIN = 1000


class RedisTable(ReplayTable):
    """One replay table under one prefix of one Redis."""

    def __init__(
        self,
        client: Client,
        prefix: str,
        *,
        chunks: ChunkStore | None = None,
        draw: Callable[[], float] = random.random,
    ) -> None:
        """Attach to a table.

        Args:
            client: From `connect`.
            prefix: Of all its keys.
            chunks: Where payloads lie; by default where the client's URL says.
            draw: Where selectors take their numbers in [0, 1) from, one a use.
        """
        self._client = client
        self._prefix = prefix
        self._scripts = Scripts(client, prefix)
        self._chunks = chunks or chunk_store(client, prefix)
        self._draw = draw

    @override
    def create(
        self,
        capacity_bytes: int,
        signature: TableSignature,
        max_times_sampled: int,
        limiter: RateLimiter | None = None,
        selector: Selector | None = None,
    ) -> None:
        limiter = limiter or RateLimiter(samples_per_insert=max_times_sampled)
        selector = selector or Selector()
        status, rest = self._scripts.run(
            "create",
            signature.model_dump_json(),
            capacity_bytes,
            max_times_sampled,
            secrets.token_hex(4),
            limiter.min_size,
            limiter.samples_per_insert,
            *(_bound(value) for value in (limiter.min_diff, limiter.max_diff, limiter.largest_lease)),
            selector.kind.value,
            selector.priority_exponent,
            selector.importance_exponent,
        )
        if status == "SIGNATURE":
            raise refusals.other_signature(self._prefix, rest[0].decode(), signature)
        if status == "SHRUNK":
            raise refusals.shrunk_capacity(self._prefix, int(rest[0]), capacity_bytes)

    @override
    def incarnation(self) -> str | None:
        text: Any = self._client.hget(table_key(self._prefix), "incarnation")
        return None if text is None else text.decode()

    @override
    def generation(self) -> int | None:
        text: Any = self._client.hget(table_key(self._prefix), "generation")
        return None if text is None else int(text)

    @override
    def signature(self) -> TableSignature | None:
        text: Any = self._client.hget(table_key(self._prefix), "signature")
        return None if text is None else TableSignature.model_validate_json(text)

    @override
    def admit(self, job: CaptureJob, num_bytes: int, now_s: float, *, queued: bool = False) -> Admission:
        num_uses = len(uses_of(job))
        if not num_uses or num_bytes <= 0:
            raise refusals.nothing_to_insert(job, num_uses, num_bytes)
        outcome = resident_already(job, num_bytes)
        status, rest = self._scripts.run(
            "admit", job.capture, job.attempt, num_bytes, num_uses, now_s, outcome.model_dump_json(), int(queued)
        )
        if status == "TOO_LARGE":
            raise refusals.too_large(job, num_bytes, int(rest[0]))
        if status == "USES":
            raise refusals.too_many_uses(job, num_uses, int(rest[0]))
        return Admission(status)

    @override
    def open(self) -> None:
        self._chunks.open()

    @override
    def writing(self, job: CaptureJob) -> AbstractContextManager[ChunkWriter]:
        return self._chunks.writing(job)

    @override
    def read_into(self, job: CaptureJob, index: int, place: Buffer) -> None:
        self._chunks.read_into(job, index, place)

    @override
    def reading(self, job: CaptureJob) -> AbstractContextManager[ChunkReader]:
        return self._chunks.reading(job)

    @override
    def commit(self, sample: Sample, now_s: float) -> None:
        job = sample.job
        signature = self.signature()
        if signature is not None:
            check_chunks(sample, signature)
        sizes = [chunk.num_bytes for chunk in sample.chunks]
        status, rest = self._scripts.run(
            "commit",
            job.capture,
            job.attempt,
            sample.num_bytes,
            now_s,
            sample.model_dump_json(),
            committed(sample).model_dump_json(),
            len(sizes),
            *sizes,
            *uses_of(job),
        )
        if status == "STALE":
            raise refusals.stale_attempt(job, rest)
        if status == "BYTES":
            raise refusals.unreserved_bytes(job, int(rest[0]), int(rest[1]))
        if status == "CHUNKS":
            raise refusals.other_chunks(job, int(rest[0]), len(sizes))
        if status == "SIZE":
            raise refusals.other_chunk_size(job, *map(int, rest))
        if status == "ARRIVED":
            raise refusals.missing_bytes(job, int(rest[0]), int(rest[1]))

    @override
    def abandon(self, job: CaptureJob, outcome: Outcome) -> bool:
        status, _ = self._scripts.run("abandon", job.capture, job.attempt, outcome.model_dump_json())
        return status == "OK"

    @override
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
        if captures is not None and len(captures) == 0:
            return []
        how: list[str | int | float] = (
            ["drawn", *(self._draw() for _ in range(count))] if captures is None else ["named", *captures]
        )
        status, rest = self._scripts.run("lease", rank, generation, count, now_s + lease_s, *how)
        self._check_generation(status, rest, generation)
        if status == "COUNT":
            raise refusals.too_many_at_once(count, int(rest[0]))
        leases = []
        for lease_id, k, record, importance in zip(rest[0::4], rest[1::4], rest[2::4], rest[3::4], strict=True):
            sample = Sample.model_validate_json(record)
            leases.append(
                SampleLease(
                    lease_id=lease_id.decode(),
                    use=sample.job.capture * sample.job.reuse + int(k),
                    k=int(k),
                    sample=sample,
                    importance=float(importance),
                )
            )
        return leases

    @override
    def ack(self, leases: Iterable[LeaseName], generation: int, now_s: float) -> None:
        status, rest = self._scripts.run("ack", generation, now_s, *(lease.lease_id for lease in leases))
        self._check_held(status, rest, generation)
        if status == "OVERDUE":
            raise refusals.overdue(rest[0].decode(), now_s - float(rest[1]))

    @override
    def release(self, leases: Iterable[LeaseName], generation: int) -> None:
        status, rest = self._scripts.run("release", generation, *(lease.lease_id for lease in leases))
        self._check_held(status, rest, generation)

    @override
    def update_priorities(self, rejections: Mapping[int, float]) -> int:
        pairs = (part for pair in priorities(rejections).items() for part in pair)
        _, rest = self._scripts.run("update_priorities", *pairs)
        return int(rest[0])

    @override
    def expire(self, now_s: float) -> list[int]:
        _, rest = self._scripts.run("expire", now_s)
        return [int(capture) for capture in rest]

    @override
    def set_generation(self, generation: int) -> None:
        status, rest = self._scripts.run("set_generation", generation)
        self._check_generation(status, rest, generation)

    @override
    def clear(self, generation: int) -> Cleared:
        incarnation = secrets.token_hex(4)
        status, rest = self._scripts.run("clear", generation, incarnation)
        self._check_generation(status, rest, generation)
        return Cleared(incarnation, [Outcome.model_validate_json(text) for text in rest])

    @override
    def seal(self) -> None:
        self._scripts.run("seal")

    @override
    def info(self) -> TableInfo:
        _, rest = self._scripts.run("info")
        fields = {name.decode(): value.decode() for name, value in zip(rest[0::2], rest[1::2], strict=True)}

        def number(name: str) -> int:
            return int(fields[name])

        min_diff, max_diff = (int(fields[name]) if fields[name] else None for name in ("min_diff", "max_diff"))
        limiter = RateLimiter(
            number("min_size"),
            number("samples_per_insert"),
            -math.inf if min_diff is None else min_diff,
            math.inf if max_diff is None else max_diff,
        )
        state = LimiterState(
            size=number("inserts") - number("deletes"),
            promised=number("promised"),
            sampled=number("taken"),
            num_inserting=number("inserting"),
            promising=number("promising"),
            is_full=number("wanted") > 0 and number("resident") + number("wanted") > number("capacity"),
            is_sealed=fields["sealed"] == "1",
        )
        return TableInfo(
            resident_bytes=number("resident"),
            peak_bytes=number("peak"),
            wanted_bytes=number("wanted"),
            capacity_bytes=number("capacity"),
            num_ready=number("ready"),
            num_ready_uses=number("uses") - number("taken"),
            num_leased=number("leased"),
            num_inserting=state.num_inserting,
            inserts=number("inserts"),
            samples=number("samples"),
            deletes=number("deletes"),
            sealed=state.is_sealed,
            generation=number("generation"),
            max_times_sampled=number("max_times_sampled"),
            selector=fields["selector"],
            min_size=limiter.min_size,
            samples_per_insert=limiter.samples_per_insert,
            min_diff=min_diff,
            max_diff=max_diff,
            difference=state.promised + state.promising - state.sampled,
            can_insert=limiter.can_insert(state, limiter.samples_per_insert),
            can_sample=limiter.can_sample(state, 1),
        )

    @override
    def drain_outcomes(self) -> list[Outcome]:
        outcomes: list[Outcome] = []
        while True:
            batch: Any = self._client.lpop(f"{self._prefix}:outcomes", OUTCOMES_A_DRAIN) or []
            outcomes.extend(Outcome.model_validate_json(text) for text in batch)
            if len(batch) < OUTCOMES_A_DRAIN:
                return outcomes

    @override
    def destroy(self) -> None:
        destroy(self._client, self._prefix, keep_claim=True)

    @override
    def close(self) -> None:
        self._chunks.close()

    def _check_generation(self, status: str, rest: Reply, generation: int) -> None:
        if status == "STALE":
            raise refusals.stale_generation(self._prefix, generation, int(rest[0]))

    def _check_held(self, status: str, rest: Reply, generation: int) -> None:
        self._check_generation(status, rest, generation)
        if status == "UNKNOWN":
            raise refusals.not_held(rest[0].decode())


def _bound(value: float) -> str | int:
    """A limit as the scripts keep it: '' without bounds."""
    return int(value) if math.isfinite(value) else ""
