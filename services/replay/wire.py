"""Messages of proto/replay.proto to and from records. What comes from outside is parsed and bounded here. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

from google.protobuf.message import DecodeError, Message

from services.contracts import (
    MAX_CHUNK_BYTES,
    CaptureJob,
    Chunk,
    LeaseName,
    Sample,
    SampleLease,
    TableInfo,
    TableSignature,
    TensorName,
)
from services.errors import ReplayRequestError, WireError
from services.target.framing import FramedChunk, parts_of, read_varint, unpack, write_varint
from services.target.request import DTYPE_FROM_WIRE, DTYPE_TO_WIRE, TENSOR_FROM_WIRE, TENSOR_TO_WIRE
from services.wire import replay_pb2 as wire
from services.wire import target_pb2 as target_wire

SERVICE = wire.DESCRIPTOR.services_by_name["Replay"].full_name
"""Name of the gRPC service, in front of its methods' names."""

WIRE_VERSION = 1
"""Version of proto/replay.proto; both ends must have the same."""

MAX_TOKENS = 2**18
"""Longest sample: its `begin`, three lists of numbers, stays below the largest chunk."""

MAX_SAMPLE_ID = 2**53
"""Sample ids lie below it: Lua and JSON count in floats."""

MAX_LEASES = 4096
"""Most leases, sample ids or rejections of one message."""

MAX_LEASE_S = 24 * 3600.0
MAX_NAME = 100
MAX_LAYERS = 1024
HEADER_BYTES = 64 * 1024
"""Room for a chunk's metadata beside its payload."""

MAX_MESSAGE_BYTES = MAX_CHUNK_BYTES + HEADER_BYTES

_LENGTH_DELIMITED = 2

M = TypeVar("M", bound=Message)


class Open(NamedTuple):
    """What a producer says of itself first."""

    signature: TableSignature
    producer: str


class Begin(NamedTuple):
    """A sample that is to come. Which attempt it is, the service says."""

    job: CaptureJob
    max_wait_s: float


class Commit(NamedTuple):
    """All chunks of a sample were sent."""

    sample_id: int


class LeaseRequest(NamedTuple):
    """A checked request for leases."""

    rank: int
    generation: int
    num_uses: int
    lease_s: float
    max_wait_s: float
    captures: tuple[int, ...] | None
    with_chunks: bool


class EndRequest(NamedTuple):
    """Leases to be ended."""

    generation: int
    leases: tuple[LeaseName, ...]


def parse(kind: type[M], message: bytes) -> M:
    """A message from its bytes.

    Raises:
        ReplayRequestError: They are none.
    """
    try:
        parsed: M = kind.FromString(message)
    except DecodeError as error:
        raise ReplayRequestError(
            f"these {len(message)} bytes are no {kind.DESCRIPTOR.name} of proto/replay.proto: {error}"
        ) from error
    return parsed


def pack_chunk(holder: type[wire.InsertRequest] | type[wire.LeaseResponse], chunk: FramedChunk) -> bytes:
    """A message that holds a chunk and nothing else; the payload is copied once, into the result."""
    parts = parts_of(chunk)
    length = sum(len(part) for part in parts)
    return b"".join([write_varint(_chunk_tag(holder)), write_varint(length), *parts])


def unpack_chunk(holder: type[wire.InsertRequest] | type[wire.LeaseResponse], message: bytes) -> FramedChunk | None:
    """The chunk, if a message holds one and nothing else; its payload is a view into the message.

    Raises:
        WireError: It is cut short, or its bytes are no chunk.
    """
    view = memoryview(message)
    if not view:
        return None
    tag, position = read_varint(view, 0)
    if tag != _chunk_tag(holder):
        return None
    length, position = read_varint(view, position)
    return unpack(view[position:]) if position + length == len(view) else None


def _chunk_tag(holder: type[wire.InsertRequest] | type[wire.LeaseResponse]) -> int:
    return holder.CHUNK_FIELD_NUMBER << 3 | _LENGTH_DELIMITED


def read_step(message: bytes, reuse: int) -> Open | Begin | FramedChunk | Commit:
    """One message of an Insert stream.

    Args:
        message: Its bytes.
        reuse: Most uses of one sample.

    Raises:
        ReplayRequestError: It is none, or its values cannot be.
        WireError: A chunk is cut short.
    """
    try:
        framed = unpack_chunk(wire.InsertRequest, message)
    except WireError:
        framed = None  # protobuf, below, says better what is wrong
    if framed is not None:
        return framed
    request = parse(wire.InsertRequest, message)
    step = request.WhichOneof("step")
    if step == "open":
        return _read_open(request.open)
    if step == "begin":
        return _read_begin(request.begin, reuse)
    if step == "chunk":  # written by someone who orders the fields otherwise
        payload = memoryview(request.chunk.payload)
        request.chunk.ClearField("payload")
        return FramedChunk(request.chunk, payload)
    if step == "commit":
        return Commit(request.commit.sample_id)
    raise ReplayRequestError("this InsertRequest says nothing: set open, begin, chunk or commit")


def _read_open(message: wire.Open) -> Open:
    if message.wire_version != WIRE_VERSION:
        raise ReplayRequestError(
            f"wire_version {message.wire_version} is not this service's {WIRE_VERSION}: run the same Slipstream "
            "version on both ends"
        )
    if len(message.producer) > MAX_NAME or not message.producer.isprintable():
        raise ReplayRequestError(f"the producer's name must have at most {MAX_NAME} characters, all printable")
    return Open(read_signature(message.signature), message.producer)


def read_signature(message: wire.Signature) -> TableSignature:
    """A signature.

    Raises:
        ReplayRequestError: It is none.
    """
    if not message.fingerprint or len(message.fingerprint) > MAX_NAME or not message.fingerprint.isprintable():
        raise ReplayRequestError(
            f"signature.fingerprint must have 1 to {MAX_NAME} printable characters: that of the target's Describe"
        )
    if message.dtype not in DTYPE_FROM_WIRE:
        names = ", ".join(target_wire.WireDtype.Name(number) for number in DTYPE_FROM_WIRE)
        raise ReplayRequestError(f"signature.dtype {message.dtype} is unknown; choose one of {names}")
    if not 1 <= len(message.layer_ids) <= MAX_LAYERS or message.hidden_size < 1:
        raise ReplayRequestError(
            f"the signature has {len(message.layer_ids)} layers of hidden size {message.hidden_size}: give 1 to "
            f"{MAX_LAYERS} layers and a size of at least 1"
        )
    return TableSignature(
        fingerprint=message.fingerprint,
        layer_ids=tuple(message.layer_ids),
        hidden_size=message.hidden_size,
        dtype=DTYPE_FROM_WIRE[message.dtype],
    )


def write_signature(signature: TableSignature) -> wire.Signature:
    """The message of a signature."""
    return wire.Signature(
        fingerprint=signature.fingerprint,
        layer_ids=signature.layer_ids,
        hidden_size=signature.hidden_size,
        dtype=DTYPE_TO_WIRE[signature.dtype],
    )


def _read_begin(message: wire.Begin, reuse: int) -> Begin:
    name, num_tokens = f"sample {message.sample_id}", len(message.token_ids)
    _check_sample_id(message.sample_id)
    if not 1 <= num_tokens <= MAX_TOKENS:
        raise ReplayRequestError(f"{name} has {num_tokens} tokens; a sample has 1 to {MAX_TOKENS}")
    if len(message.loss_mask) != num_tokens or max(message.loss_mask) > 1:
        raise ReplayRequestError(
            f"the loss mask of {name} has {len(message.loss_mask)} entries for {num_tokens} tokens; give a 0 or 1 for "
            "each"
        )
    previous = -1
    for row in message.last_rows:
        if not previous < row < num_tokens:
            raise ReplayRequestError(
                f"last_rows of {name} must ascend without repeats below its {num_tokens} tokens, but {row} follows "
                f"{previous}"
            )
        previous = row
    if message.num_uses > reuse:
        raise ReplayRequestError(f"{name} shall feed {message.num_uses} uses, the table allows a sample {reuse}")
    if not 0 <= message.max_wait_s < math.inf:
        raise ReplayRequestError(f"max_wait_s {message.max_wait_s} of {name} must be a number of seconds from 0 on")
    job = CaptureJob(
        capture=message.sample_id,
        prompt=message.prompt if message.HasField("prompt") else message.sample_id,
        epoch=message.epoch,
        reuse=reuse,
        input_ids=tuple(message.token_ids),
        loss_mask=tuple(message.loss_mask),
        last_rows=tuple(message.last_rows),
        ks=tuple(range(message.num_uses)) if 0 < message.num_uses < reuse else None,
    )
    return Begin(job, message.max_wait_s)


def _check_sample_id(sample_id: int) -> None:
    if sample_id >= MAX_SAMPLE_ID:
        raise ReplayRequestError(f"sample id {sample_id} is not below 2^53")


def read_chunk(framed: FramedChunk, job: CaptureJob, signature: TableSignature) -> Chunk:
    """The record of an inserted chunk, held against its sample. `check_arrival` is left to do.

    Raises:
        ReplayRequestError: It belongs to another sample, or names what there is not.
        WireError: Its rows, width or dtype are not those of the sample.
    """
    header = framed.header
    if header.sample_id != job.capture:
        raise ReplayRequestError(f"a chunk of sample {header.sample_id} came within sample {job.capture}")
    if header.tensor not in TENSOR_FROM_WIRE:
        raise ReplayRequestError(f"sample {job.capture}: tensor number {header.tensor} is unknown")
    tensor = TENSOR_FROM_WIRE[header.tensor]
    if DTYPE_FROM_WIRE.get(header.dtype) != signature.dtype:
        raise WireError(f"sample {job.capture}: dtype number {header.dtype} came, the table holds {signature.dtype}")
    num_rows = job.num_tokens if tensor == "context" else len(job.last_rows)
    row_width = _row_width(tensor, signature)
    if header.row_width != row_width:
        raise WireError(
            f"sample {job.capture}: rows of {tensor} with {header.row_width} elements came, the table has {row_width}"
        )
    if not header.row_start < header.row_end <= num_rows:
        raise WireError(
            f"sample {job.capture}: rows {header.row_start} to {header.row_end} of {tensor} came, it has {num_rows}"
        )
    if framed.payload.nbytes > MAX_CHUNK_BYTES:
        raise WireError(
            f"sample {job.capture}: a chunk of {framed.payload.nbytes} bytes came, at most {MAX_CHUNK_BYTES} are taken"
        )
    return Chunk(
        tensor=tensor,
        row_start=header.row_start,
        row_end=header.row_end,
        num_bytes=framed.payload.nbytes,
        crc32c=header.crc32c,
    )


def _row_width(tensor: TensorName, signature: TableSignature) -> int:
    """Elements of one row."""
    return (len(signature.layer_ids) if tensor == "context" else 1) * signature.hidden_size


def write_chunk(job: CaptureJob, chunk: Chunk, signature: TableSignature) -> target_wire.FeatureChunk:
    """The header of a chunk that travels."""
    return target_wire.FeatureChunk(
        sample_id=job.capture,
        generation=job.attempt,
        tensor=TENSOR_TO_WIRE[chunk.tensor],
        row_start=chunk.row_start,
        row_end=chunk.row_end,
        row_width=_row_width(chunk.tensor, signature),
        dtype=DTYPE_TO_WIRE[signature.dtype],
        crc32c=chunk.crc32c,
    )


def read_lease_request(message: bytes) -> LeaseRequest:
    """A request for leases.

    Raises:
        ReplayRequestError: It is none, or its values cannot be.
    """
    request = parse(wire.LeaseRequest, message)
    captures = tuple(request.sample_ids)
    for capture in captures:
        _check_sample_id(capture)
    if captures and request.count not in (0, len(captures)):
        raise ReplayRequestError(f"count {request.count} goes with {len(captures)} sample_ids: give one of the two")
    count = len(captures) or request.count
    if not 1 <= count <= MAX_LEASES:
        raise ReplayRequestError(f"a lease of {count} uses: ask for 1 to {MAX_LEASES}")
    if not 0 < request.lease_s <= MAX_LEASE_S:
        raise ReplayRequestError(f"lease_s {request.lease_s} must lie above 0, and at {MAX_LEASE_S:g} at most")
    if not 0 <= request.max_wait_s < math.inf:
        raise ReplayRequestError(f"max_wait_s {request.max_wait_s} must be a number of seconds from 0 on")
    _check_generation(request.generation)
    return LeaseRequest(
        rank=request.rank,
        generation=request.generation,
        num_uses=count,
        lease_s=request.lease_s,
        max_wait_s=request.max_wait_s,
        captures=captures or None,
        with_chunks=request.with_chunks,
    )


def _check_generation(generation: int) -> None:
    if generation >= MAX_SAMPLE_ID:
        raise ReplayRequestError(f"generation {generation} is not below 2^53")


def read_end(kind: type[wire.AckRequest] | type[wire.ReleaseRequest], message: bytes) -> EndRequest:
    """The leases to be ended.

    Raises:
        ReplayRequestError: It is no such message, or names too many, or none.
    """
    request = parse(kind, message)
    if not 1 <= len(request.lease_ids) <= MAX_LEASES:
        raise ReplayRequestError(f"{len(request.lease_ids)} lease ids: name 1 to {MAX_LEASES} at once")
    for lease_id in request.lease_ids:
        if not lease_id or len(lease_id) > MAX_NAME or not lease_id.isprintable():
            raise ReplayRequestError("a lease id is none of ours: send those that Lease gave, as they are")
    _check_generation(request.generation)
    return EndRequest(request.generation, tuple(LeaseName(lease_id=lease_id) for lease_id in request.lease_ids))


def read_rejections(message: bytes) -> dict[int, float]:
    """Rejections by sample.

    Raises:
        ReplayRequestError: It is no such message, or a number is none from 0 to 1.
    """
    request = parse(wire.UpdatePrioritiesRequest, message)
    if len(request.rejections) > MAX_LEASES:
        raise ReplayRequestError(f"{len(request.rejections)} rejections: send at most {MAX_LEASES} at once")
    rejections: dict[int, float] = {}
    for item in request.rejections:
        _check_sample_id(item.sample_id)
        if not 0 <= item.rejection <= 1:
            raise ReplayRequestError(f"the rejection {item.rejection} of sample {item.sample_id} is not from 0 to 1")
        if item.sample_id in rejections:
            raise ReplayRequestError(f"sample {item.sample_id} has two rejections: send one")
        rejections[item.sample_id] = item.rejection
    return rejections


def write_lease(lease: SampleLease) -> wire.Lease:
    """The message of a lease."""
    sample, job = lease.sample, lease.sample.job
    return wire.Lease(
        lease_id=lease.lease_id,
        sample_id=job.capture,
        attempt=job.attempt,
        k=lease.k,
        importance=lease.importance,
        prompt=job.prompt,
        epoch=job.epoch,
        reuse=job.reuse,
        uses=None if job.ks is None else wire.Uses(ks=job.ks),
        token_ids=job.input_ids,
        loss_mask=job.loss_mask,
        last_rows=job.last_rows,
        chunks=[
            wire.StoredChunk(
                tensor=TENSOR_TO_WIRE[chunk.tensor],
                row_start=chunk.row_start,
                row_end=chunk.row_end,
                num_bytes=chunk.num_bytes,
                crc32c=chunk.crc32c,
            )
            for chunk in sample.chunks
        ],
        num_bytes=sample.num_bytes,
        producer=sample.target,
    )


def read_lease(message: wire.Lease) -> SampleLease:
    """The lease in a message.

    Raises:
        WireError: A tensor of it is unknown.
    """
    job = CaptureJob(
        capture=message.sample_id,
        attempt=message.attempt,
        prompt=message.prompt,
        epoch=message.epoch,
        reuse=message.reuse,
        input_ids=tuple(message.token_ids),
        loss_mask=tuple(message.loss_mask),
        last_rows=tuple(message.last_rows),
        ks=tuple(message.uses.ks) if message.HasField("uses") else None,
    )
    sample = Sample(job=job, chunks=_read_stored(message.chunks), num_bytes=message.num_bytes, target=message.producer)
    return SampleLease(
        lease_id=message.lease_id,
        use=job.capture * job.reuse + message.k,
        k=message.k,
        sample=sample,
        importance=message.importance,
    )


def _read_stored(chunks: Sequence[wire.StoredChunk]) -> tuple[Chunk, ...]:
    for chunk in chunks:
        if chunk.tensor not in TENSOR_FROM_WIRE:
            raise WireError(f"tensor number {chunk.tensor} of a lease is unknown")
    return tuple(
        Chunk(
            tensor=TENSOR_FROM_WIRE[chunk.tensor],
            row_start=chunk.row_start,
            row_end=chunk.row_end,
            num_bytes=chunk.num_bytes,
            crc32c=chunk.crc32c,
        )
        for chunk in chunks
    )


def write_table(info: TableInfo) -> wire.Table:
    """The message of a table's state."""
    return wire.Table(**info.model_dump(exclude_none=True))


def read_table(message: wire.Table) -> TableInfo:
    """A table's state."""
    values = {name: getattr(message, name) for name in TableInfo.model_fields}
    for name in ("min_diff", "max_diff"):
        if not message.HasField(name):
            values[name] = None
    return TableInfo(**values)
