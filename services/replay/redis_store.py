"""The chunk store in Redis itself: one string a chunk."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import redis
from typing_extensions import Buffer, override

from services.contracts import CaptureJob
from services.replay import refusals
from services.replay.keys import chunk_key
from services.replay.scripts import Reply, Scripts
from services.replay.store import ChunkStore, ChunkWriter


class RedisChunkStore(ChunkStore):
    """Chunks under the prefix of their table, in the same Redis."""

    def __init__(self, client: redis.Redis, prefix: str) -> None:
        """Attach to a table's prefix.

        Args:
            client: From `connect`.
            prefix: Of the table's keys.
        """
        self._client = client
        self._prefix = prefix
        self._scripts = Scripts(client, prefix)

    @override
    @contextlib.contextmanager
    def writing(self, job: CaptureJob) -> Iterator[ChunkWriter]:
        yield _Writer(self._client, self._scripts, job)

    @override
    def read_into(self, job: CaptureJob, index: int, place: Buffer) -> None:
        view = memoryview(place).cast("B")
        payload: Any = self._client.get(chunk_key(self._prefix, job.capture, job.attempt, index))
        if payload is None:
            raise refusals.missing_payload(job, index)
        if len(payload) != view.nbytes:
            raise refusals.other_payload_size(job, index, len(payload), view.nbytes)
        view[:] = payload

    @override
    def close(self) -> None:
        pass


class _Writer(ChunkWriter):
    def __init__(self, client: redis.Redis, scripts: Scripts, job: CaptureJob) -> None:
        self._client = client
        self._scripts = scripts
        self._job = job

    @override
    def write(self, index: int, payload: Buffer) -> None:
        job, view = self._job, memoryview(payload).cast("B")
        status, rest = self._scripts.run("place", job.capture, job.attempt, index, view.nbytes)
        check_placed(job, index, status, rest)
        if not self._client.set(rest[0], view, xx=True):
            raise refusals.not_being_inserted(job, "gone", None)

    @override
    def flush(self) -> None:
        pass


def check_placed(job: CaptureJob, index: int, status: str, rest: Reply) -> None:
    """Raise what the script `place` refuses a chunk with."""
    if status == "OVERFLOW":
        raise refusals.overflowing_chunk(job, index, int(rest[0]), int(rest[1]))
    if status == "GAP":
        raise refusals.missing_chunk(job, index, int(rest[0]))
    if status == "STALE":
        raise refusals.stale_attempt(job, rest)
