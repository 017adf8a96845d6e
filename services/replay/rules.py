"""The rules of a replay table that need no storage: what admission answers, which uses and chunks make a sample."""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple

from services.contracts import CaptureJob, Outcome, Sample, TableSignature
from services.errors import WireError

ALREADY_RESIDENT = "already resident"
"""Reason of the outcome of a job whose sample is here: nothing was captured."""


class Admission(StrEnum):
    """What a table answers to a capture that asks for space."""

    ADMITTED = "ADMITTED"
    """The bytes are reserved. A newer attempt of a capture in flight takes over its reservation, full or not."""

    FULL = "FULL"
    """Not now: wait until a trainer has freed enough bytes, or has sampled enough for the rate limiter."""

    KNOWN = "KNOWN"
    """The sample is here already, or this attempt or a newer one of it is in flight."""

    GONE = "GONE"
    """The work queue has no such job any more: nobody waits for it."""


class Cleared(NamedTuple):
    """What `ReplayTable.clear` leaves behind."""

    incarnation: str
    """Of the table made anew."""
    outcomes: list[Outcome]
    """Those that nobody had drained."""


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


def resident_already(job: CaptureJob, num_bytes: int) -> Outcome:
    """The outcome of a job whose sample is here already."""
    return Outcome(
        capture=job.capture,
        attempt=job.attempt,
        kind="committed",
        num_tokens=job.num_tokens,
        num_bytes=num_bytes,
        reason=ALREADY_RESIDENT,
    )


def committed(sample: Sample) -> Outcome:
    """The outcome of a commit."""
    job = sample.job
    return Outcome(
        capture=job.capture,
        attempt=job.attempt,
        kind="committed",
        num_tokens=job.num_tokens,
        num_bytes=sample.num_bytes,
    )
