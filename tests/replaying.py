"""What the contract suites of replay tables share: small samples, and short ways to do the usual."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

from typing_extensions import Buffer

from services.contracts import CaptureJob, Chunk, Outcome, Sample, SampleLease, TableSignature
from services.errors import UnknownSampleError
from services.replay.protocol import CaptureQueue, ReplayTable
from services.replay.rules import Admission

SIGNATURE = TableSignature(fingerprint="f", layer_ids=(0, 2), hidden_size=4, dtype="bf16")
"""16 bytes a context row, 8 bytes a last row."""

JOB_BYTES = 56
"""A sample of 3 tokens and 1 last row."""


class Replay(NamedTuple):
    """A table, and the work queue that belongs to it."""

    table: ReplayTable
    work: CaptureQueue


MakeReplay = Callable[..., Replay]
"""Makes a table under a prefix of its own; `seed` or `draw` say where its selectors' numbers come from."""


def make_job(
    capture: int, *, tokens: int = 3, attempt: int = 0, reuse: int = 1, ks: tuple[int, ...] | None = None
) -> CaptureJob:
    return CaptureJob(
        capture=capture,
        attempt=attempt,
        prompt=capture + 100,
        epoch=0,
        reuse=reuse,
        input_ids=tuple(range(tokens)),
        loss_mask=(0,) * (tokens - 2) + (1, 1),
        last_rows=(tokens - 2,),
        ks=ks,
    )


def bytes_of(job: CaptureJob) -> int:
    return 16 * job.num_tokens + 8


def make_sample(job: CaptureJob) -> Sample:
    """Two chunks: all context rows, and the one last row."""
    chunks = (
        Chunk(tensor="context", row_start=0, row_end=job.num_tokens, num_bytes=16 * job.num_tokens, crc32c=0),
        Chunk(tensor="last", row_start=0, row_end=1, num_bytes=8, crc32c=0),
    )
    return Sample(job=job, chunks=chunks, num_bytes=bytes_of(job), target="somewhere")


def put_chunk(table: ReplayTable, job: CaptureJob, index: int, payload: Buffer) -> None:
    """Write one chunk and wait until it is stored."""
    with table.writing(job) as writer:
        writer.write(index, payload)


def get_chunk(table: ReplayTable, job: CaptureJob, index: int, num_bytes: int | None = None) -> bytes | None:
    """Read one chunk, by default of the size that `make_sample` gives it; None if it is not there."""
    chunks = make_sample(job).chunks
    place = bytearray(num_bytes if num_bytes is not None else chunks[min(index, 1)].num_bytes)
    try:
        table.read_into(job, index, place)
    except UnknownSampleError:
        return None
    return bytes(place)


def store(table: ReplayTable, job: CaptureJob) -> Sample:
    sample = make_sample(job)
    with table.writing(job) as writer:
        for index, chunk in enumerate(sample.chunks):
            writer.write(index, bytes([index + 1]) * chunk.num_bytes)
    return sample


def insert(table: ReplayTable, job: CaptureJob, now_s: float = 0.0) -> Sample:
    assert table.admit(job, bytes_of(job), now_s) is Admission.ADMITTED
    sample = store(table, job)
    table.commit(sample, now_s)
    return sample


def lease(
    table: ReplayTable, count: int = 1, *, now_s: float = 0.0, generation: int = 0, captures: list[int] | None = None
) -> list[SampleLease]:
    return table.lease(rank=0, generation=generation, count=count, now_s=now_s, lease_s=10.0, captures=captures)


def captures_of(leases: list[SampleLease]) -> list[int]:
    return [item.sample.job.capture for item in leases]


def failed(job: CaptureJob, *, retry: bool = False) -> Outcome:
    return Outcome(capture=job.capture, attempt=job.attempt, kind="failed", retry=retry, reason="because")


class LeaseReader:
    """Opens leased samples whose chunks a function reads; what `ReplayReader.reading` is to trainers."""

    def __init__(self, read_into: Callable[[SampleLease, int, memoryview], None], lease: SampleLease) -> None:
        self._read_into = read_into
        self._lease = lease

    def read_into(self, index: int, place: Buffer) -> None:
        self._read_into(self._lease, index, memoryview(place))

    @classmethod
    def by(
        cls, read_into: Callable[[SampleLease, int, memoryview], None]
    ) -> Callable[[SampleLease], AbstractContextManager[LeaseReader]]:
        return lambda lease: nullcontext(cls(read_into, lease))
