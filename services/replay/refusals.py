"""What a table and a work queue refuse, in words: the same for every implementation."""

from __future__ import annotations

from collections.abc import Sequence

from services.contracts import CaptureJob, TableSignature
from services.errors import (
    ReplayError,
    SampleTooLargeError,
    SignatureError,
    StaleGenerationError,
    TableLostError,
    UnknownSampleError,
    WireError,
)


def table_lost(prefix: str) -> TableLostError:
    """There is no table."""
    return TableLostError(
        f"there is no replay table under the prefix {prefix!r}: it was never created, or Redis restarted "
        "empty. Run the same command again: it continues from the last checkpoint."
    )


def other_signature(prefix: str, held: str, wanted: TableSignature) -> SignatureError:
    """The table holds something else; `held` is its signature as JSON."""
    difference = wanted.differences(TableSignature.model_validate_json(held))
    return SignatureError(
        f"the replay table {prefix!r} holds samples of {held}, not of {wanted.model_dump_json()} ({difference}). Give "
        "this run another name, or end the run that uses the table."
    )


def shrunk_capacity(prefix: str, resident_bytes: int, capacity_bytes: int) -> ReplayError:
    """The table holds more than it shall."""
    return ReplayError(
        f"the replay table {prefix!r} holds {resident_bytes} bytes, more than the new capacity of {capacity_bytes}. "
        "Keep replay.capacity or wait until the samples are used."
    )


def nothing_to_insert(job: CaptureJob, num_uses: int, num_bytes: int) -> ReplayError:
    """A capture without uses or bytes."""
    return ReplayError(f"capture {job.capture} feeds {num_uses} uses with {num_bytes} bytes; both must be positive")


def too_large(job: CaptureJob, num_bytes: int, capacity_bytes: int) -> SampleTooLargeError:
    """A sample that fits no empty table."""
    return SampleTooLargeError(
        f"capture {job.capture} with {job.num_tokens} tokens needs {num_bytes} bytes, the whole replay buffer "
        f"holds {capacity_bytes}. Raise replay.capacity or lower prompts.max_length."
    )


def too_many_uses(job: CaptureJob, num_uses: int, allowed: int) -> ReplayError:
    """A capture that feeds more uses than a sample may."""
    return ReplayError(
        f"capture {job.capture} feeds {num_uses} uses, the table allows {allowed}: replay.reuse differs "
        "between the coordinator and the shard"
    )


def overflowing_chunk(job: CaptureJob, index: int, total_bytes: int, reserved_bytes: int) -> WireError:
    """A chunk that does not fit what was reserved."""
    return WireError(
        f"capture {job.capture}: chunk {index} brings it to {total_bytes} bytes, {reserved_bytes} are reserved"
    )


def missing_chunk(job: CaptureJob, index: int, due: int) -> WireError:
    """A chunk before its turn."""
    return WireError(f"capture {job.capture}: chunk {index} came where chunk {due} was due")


def not_being_inserted(job: CaptureJob, state: str, attempt: int | None) -> UnknownSampleError:
    """An attempt that is not, or no longer, being inserted. `state` and `attempt` are what the table has instead."""
    now = "it was abandoned or never admitted" if attempt is None else f"it is {state} with attempt {attempt}"
    return UnknownSampleError(f"attempt {job.attempt} of capture {job.capture} is not being inserted: {now}")


def stale_attempt(job: CaptureJob, held: Sequence[bytes]) -> UnknownSampleError:
    """The same; `held` are state and attempt as a script answers them."""
    state, attempt = (part.decode() for part in held)
    return not_being_inserted(job, state, int(attempt) if attempt else None)


def refused_chunk(job: CaptureJob, status: str, rest: Sequence[bytes]) -> WireError | UnknownSampleError | None:
    """What a script says of a chunk that it does not take; None if it says something else."""
    if status == "OVERFLOW":
        return overflowing_chunk(job, *map(int, rest))
    if status == "GAP":
        return missing_chunk(job, *map(int, rest))
    if status == "STALE":
        return stale_attempt(job, rest)
    return None


def unreserved_bytes(job: CaptureJob, num_bytes: int, reserved_bytes: int) -> WireError:
    """A sample of more bytes than were reserved."""
    return WireError(f"capture {job.capture}: {num_bytes} bytes were to be committed, {reserved_bytes} are reserved")


def missing_bytes(job: CaptureJob, stored_bytes: int, num_bytes: int) -> WireError:
    """A sample of which other bytes are stored than it names."""
    return WireError(f"capture {job.capture}: {stored_bytes} bytes are stored, {num_bytes} were to be committed")


def other_chunks(job: CaptureJob, num_stored: int, num_sent: int) -> WireError:
    """Another number of chunks than the sample names."""
    return WireError(f"capture {job.capture}: {num_stored} chunks are stored, {num_sent} were to be committed")


def other_chunk_size(job: CaptureJob, index: int, stored_bytes: int, sent_bytes: int) -> WireError:
    """A chunk of another length than the sample names."""
    return WireError(
        f"capture {job.capture}: chunk {index} has {stored_bytes} bytes in the table, {sent_bytes} were sent"
    )


def missing_payload(job: CaptureJob, index: int | None = None) -> UnknownSampleError:
    """A chunk that is to be read and is not there; without an index: the whole sample."""
    what = "the sample" if index is None else f"chunk {index}"
    return UnknownSampleError(
        f"{what} of capture {job.capture} is not in the replay buffer: the lease of its sample has ended. Raise "
        "replay.lease_s (lease_s of a Lease request) above the time that reading and training take."
    )


def other_payload_size(job: CaptureJob, index: int, stored_bytes: int, wanted_bytes: int) -> WireError:
    """A chunk that is not as long as the place it is to be read to."""
    return WireError(
        f"chunk {index} of capture {job.capture} has {stored_bytes} bytes in the replay buffer, its rows need "
        f"{wanted_bytes}"
    )


def too_many_at_once(count: int, largest: int) -> ReplayError:
    """A lease that the rate limiter might never allow."""
    return ReplayError(
        f"a lease of {count} uses is more than the {largest} that the rate limiter can always give at once. Raise "
        "replay.error_buffer or lower trainer.micro_batch_size."
    )


def stale_generation(prefix: str, generation: int, current: int) -> StaleGenerationError | TableLostError:
    """A trainer group that was replaced, or one that a table made anew does not know yet."""
    if current < generation:
        return TableLostError(
            f"the replay table {prefix!r} is being made anew: it has generation {current}, not yet {generation}"
        )
    return StaleGenerationError(
        f"generation {generation} is not the current one of the replay table {prefix!r}, "
        f"{current}: this trainer group has been replaced"
    )


def not_held(lease_id: str) -> UnknownSampleError:
    """A lease that is unknown, or named twice."""
    return UnknownSampleError(
        f"lease {lease_id} is not held: acked or released before, named twice, or past its deadline"
    )


def overdue(lease_id: str, late_s: float) -> UnknownSampleError:
    """An ack after the lease's deadline."""
    return UnknownSampleError(
        f"lease {lease_id} ended {late_s:.1f} s before its ack: its sample goes to "
        "another reader. Raise replay.lease_s above the time a trainer holds a sample."
    )
