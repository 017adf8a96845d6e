"""Clients of the replay service: producers that put samples in, consumers that lease them.

No torch here: features are bytes.
"""

from __future__ import annotations

import contextlib
import math
import queue
from collections.abc import Generator, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, NamedTuple, Self

import grpc
from typing_extensions import Buffer

from services.checksum import crc32c, verify
from services.contracts import (
    DEFAULT_CHUNK_BYTES,
    MAX_CHUNK_BYTES,
    CaptureJob,
    Chunk,
    LeaseName,
    SampleLease,
    TableInfo,
    TableSignature,
    TensorName,
)
from services.errors import (
    ReplayAccessError,
    ReplayBusyError,
    ReplayError,
    ReplayRequestError,
    ReplayUnavailableError,
    SlipstreamError,
    WireError,
)
from services.grpc_access import call_metadata, open_channel, why_refused
from services.grpc_errors import TOO_LARGE, TOO_LARGE_HERE, kind_of
from services.replay.wire import (
    MAX_MESSAGE_BYTES,
    SERVICE,
    WIRE_VERSION,
    pack_chunk,
    parse,
    read_lease,
    read_signature,
    read_table,
    unpack_chunk,
    write_chunk,
    write_signature,
)
from services.security import Credentials
from services.target.chunking import cut
from services.target.framing import FramedChunk
from services.target.patience import Patience, Wait
from services.target.request import TENSOR_FROM_WIRE
from services.wire import replay_pb2 as wire

ERRORS: dict[grpc.StatusCode, type[SlipstreamError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: ReplayRequestError,
    grpc.StatusCode.DATA_LOSS: WireError,
    grpc.StatusCode.UNAVAILABLE: ReplayUnavailableError,
    grpc.StatusCode.DEADLINE_EXCEEDED: ReplayUnavailableError,
    grpc.StatusCode.CANCELLED: ReplayUnavailableError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ReplayBusyError,
}
"""What a status means that came without an error's name; any other is a ReplayError."""

ANSWER_S = 30.0
"""How long a service may take to answer. A sample that waits for room is told so every few seconds."""


class ServiceInfo(NamedTuple):
    """What a replay service says of itself."""

    signature: TableSignature
    table: TableInfo
    redis_url: str | None
    """Where `services.replay.reader.ReplayReader` reads chunks, the password apart; None: `take` has them streamed."""
    prefix: str
    max_chunk_bytes: int


class ServedSample(NamedTuple):
    """A leased sample with its features, as bytes in the table's dtype: C-contiguous, little-endian."""

    lease: SampleLease
    context: bytearray
    """[T, L·D]: the layers' features side by side, in the signature's order."""
    last: bytearray
    """[R, D]: the rows of the last hidden state that the job names."""


class ReplayClient:
    """One channel to one replay service. Threads may share it.

    Args:
        address: host:port.
        credentials: Token and certificate of the service; None for one on the loopback interface that asks for none.

    Raises:
        UsageError: The token would travel without TLS beyond the loopback interface.
    """

    def __init__(self, address: str, credentials: Credentials | None = None) -> None:
        self.address = address
        self._credentials = credentials or Credentials()
        self._metadata = call_metadata(self._credentials)
        self._channel = open_channel(
            address,
            self._credentials,
            [
                ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
                ("grpc.enable_http_proxy", 0),
                ("grpc.use_local_subchannel_pool", 1),
            ],
        )
        self._patience = Patience()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the channel; running calls end with ReplayUnavailableError."""
        self._channel.close()

    def info(self, timeout_s: float = ANSWER_S) -> ServiceInfo:
        """Ask what the table holds and takes.

        Raises:
            ReplayError: As for every call: ReplayUnavailableError if the service does not answer, ReplayAccessError if
                it does not take this token or the two do not agree on TLS.
            WireError: It speaks another wire version.
        """
        answer = parse(wire.InfoResponse, self._call("Info", wire.InfoRequest(), timeout_s))
        if answer.wire_version != WIRE_VERSION:
            raise WireError(
                f"replay service {self.address} speaks wire version {answer.wire_version}, this is {WIRE_VERSION}: "
                "run the same Slipstream version on both ends"
            )
        return ServiceInfo(
            signature=read_signature(answer.signature),
            table=read_table(answer.table),
            redis_url=answer.redis_url or None,
            prefix=answer.prefix,
            max_chunk_bytes=answer.max_chunk_bytes,
        )

    def producer(self, signature: TableSignature, name: str = "") -> Producer:
        """A stream of samples into the table, opened with the first one.

        Args:
            signature: What the samples are; must be the table's.
            name: Of the producer, for the samples' metadata.
        """
        return Producer(self, signature, name)

    def lease(
        self,
        *,
        count: int = 0,
        lease_s: float,
        wait_s: float,
        rank: int = 0,
        generation: int = 0,
        captures: Sequence[int] = (),
    ) -> list[SampleLease]:
        """Lease samples whose chunks are read elsewhere (`ServiceInfo.redis_url`).

        Args:
            count: How many uses, all or none; a sealed table may give fewer.
            lease_s: The leases end by themselves this much later.
            wait_s: Longest wait until they are ready; then the list is empty.
            rank: Who leases.
            generation: Of the trainer group.
            captures: Lease exactly these samples instead, in this order.

        Raises:
            StaleGenerationError: The trainer group has been replaced.
            ReplayError: The service refuses, or does not answer.
        """
        request = _lease_request(count, lease_s, wait_s, rank, generation, captures, with_chunks=False)
        return [_lease_in(message) for message in self._leases(request, wait_s)]

    def take(
        self,
        *,
        count: int = 0,
        lease_s: float,
        wait_s: float,
        rank: int = 0,
        generation: int = 0,
        captures: Sequence[int] = (),
    ) -> list[ServedSample]:
        """Lease samples and have their features streamed; otherwise as `lease`.

        Raises:
            WireError: What came is not what the lease promised. The leases end at their deadline.
        """
        request = _lease_request(count, lease_s, wait_s, rank, generation, captures, with_chunks=True)
        samples: list[ServedSample] = []
        messages = self._leases(request, wait_s)
        with contextlib.closing(messages):
            for message in messages:
                lease = _lease_in(message)
                places: dict[TensorName, bytearray] = {"context": bytearray(), "last": bytearray()}
                for chunk in lease.sample.chunks:
                    _receive(chunk, lease, next(messages, None), places[chunk.tensor])
                samples.append(ServedSample(lease, places["context"], places["last"]))
        return samples

    def ack(self, leases: Sequence[LeaseName], generation: int = 0, timeout_s: float = ANSWER_S) -> None:
        """End leases whose samples were used; the last use of a sample frees its bytes. All of them or none.

        Raises:
            StaleGenerationError: The trainer group has been replaced.
            UnknownSampleError: A lease is not held: acked or released before, named twice, or past its deadline.
            ReplayError: The service refuses, or does not answer.
        """
        self._call("Ack", wire.AckRequest(generation=generation, lease_ids=_names(leases)), timeout_s)

    def release(self, leases: Sequence[LeaseName], generation: int = 0, timeout_s: float = ANSWER_S) -> None:
        """Give back leases whose samples were not used. Errors as `ack`."""
        self._call("Release", wire.ReleaseRequest(generation=generation, lease_ids=_names(leases)), timeout_s)

    def update_priorities(self, rejections: Mapping[int, float], timeout_s: float = ANSWER_S) -> int:
        """Note how much of the drafts for some samples was rejected, from 0 to 1 each.

        Returns:
            How many of the samples are here.
        """
        items = [wire.Rejection(sample_id=capture, rejection=value) for capture, value in rejections.items()]
        answer = self._call("UpdatePriorities", wire.UpdatePrioritiesRequest(rejections=items), timeout_s)
        return parse(wire.UpdatePrioritiesResponse, answer).num_found

    def _call(self, method: str, request: Any, timeout_s: float) -> bytes:
        # No deserializers: gRPC would replace its errors' messages by one of its own.
        call = self._channel.unary_unary(f"/{SERVICE}/{method}")
        try:
            answer: bytes = call(request.SerializeToString(), timeout=timeout_s, metadata=self._metadata)
        except grpc.RpcError as error:
            raise self._translate(error, method) from error
        except ValueError as error:  # all that gRPC raises here: this client was closed
            raise ReplayUnavailableError(f"replay service {self.address}, {method}: {error}") from error
        return answer

    def _leases(self, request: wire.LeaseRequest, wait_s: float) -> Generator[bytes, None, None]:
        call = self._channel.unary_stream(f"/{SERVICE}/Lease")
        try:
            messages = call(request.SerializeToString(), metadata=self._metadata)
        except ValueError as error:
            raise ReplayUnavailableError(f"replay service {self.address}, Lease: {error}") from error
        with self._patience.watch(messages.cancel) as wait:
            try:
                wait.begin(wait_s + ANSWER_S)
                for message in messages:
                    wait.end()
                    yield message
                    wait.begin(ANSWER_S)
            except grpc.RpcError as error:
                raise self._failed(error, wait, "Lease") from error
            finally:
                messages.cancel()

    def _failed(self, error: grpc.RpcError, wait: Wait, what: str) -> SlipstreamError:
        if wait.is_over:
            return ReplayUnavailableError(f"replay service {self.address}, {what}: it has stopped answering")
        return self._translate(error, what)

    def _translate(self, error: grpc.RpcError, what: str) -> SlipstreamError:
        if why := why_refused(error, self.address, self._credentials):
            return ReplayAccessError(f"replay service {self.address} does not let us in: {why}")
        details, kind = error.details() or "", kind_of(error, ERRORS, ReplayError)
        if TOO_LARGE_HERE in details:
            kind, details = WireError, f"{details}: a chunk has at most {MAX_CHUNK_BYTES} bytes"
        elif TOO_LARGE in details:
            kind, details = ReplayRequestError, f"{details}: send less in one call"
        return kind(f"replay service {self.address}, {what}: {details} ({error.code().name})")


class Producer:
    """Puts samples into a table, one after another. One thread uses it; others make their own.

    An error gives up the sample in progress and closes the stream; the next `insert` opens a new one. What is not known
    to be committed may be sent again: `insert` then says False if it had been.
    """

    def __init__(self, client: ReplayClient, signature: TableSignature, name: str) -> None:
        """Use `ReplayClient.producer`."""
        self._client = client
        self._signature = signature
        self._name = name
        self._stream: _Stream | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the stream."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def insert(
        self,
        sample_id: int,
        *,
        token_ids: Sequence[int],
        loss_mask: Sequence[int],
        last_rows: Sequence[int],
        context: Buffer,
        last: Buffer,
        num_uses: int = 0,
        prompt: int | None = None,
        epoch: int = 0,
        wait_s: float = 0.0,
    ) -> bool:
        """Insert a sample; returns once it is committed.

        Args:
            sample_id: Its own, below 2^53; never used for another sample, by any producer.
            token_ids: T tokens.
            loss_mask: 1 for each that counts in the loss, else 0.
            last_rows: Which R rows of the last hidden state come, ascending.
            context: Bytes of [T, L·D] in the signature's dtype (`services.codec.byte_view` of a tensor).
            last: Bytes of [R, D].
            num_uses: Passes through the drafter that it feeds; 0: all that the table allows.
            prompt: Seeds the drafter's choices, with `epoch`; the sample id by default.
            epoch: Which pass over the prompts.
            wait_s: Longest wait for room; 0: the service's bound.

        Returns:
            False if the sample had been committed before; nothing was sent.

        Raises:
            WireError: The buffers have not the size that tokens and signature call for, or arrived damaged.
            FeatureError: They hold NaN or infinity.
            SignatureError: The table holds something else.
            SampleTooLargeError: The sample is larger than the whole buffer.
            DeadlineError: There was no room in time.
            ReplayError: The service refuses, or does not answer.
        """
        begin = wire.Begin(
            sample_id=sample_id,
            token_ids=token_ids,
            loss_mask=loss_mask,
            last_rows=last_rows,
            num_uses=num_uses,
            prompt=prompt,
            epoch=epoch,
            max_wait_s=wait_s,
        )
        chunks = self._cut(sample_id, begin, memoryview(context).cast("B"), memoryview(last).cast("B"))
        try:
            stream = self._open()
            stream.send(wire.InsertRequest(begin=begin).SerializeToString())
            answer = stream.answer()
            while answer.WhichOneof("answer") == "wait":
                answer = stream.answer()
            credit = _credit(answer, sample_id)
            if credit is None:
                return False
            for chunk in chunks:
                while credit < chunk.payload.nbytes:
                    more = _credit(stream.answer(), sample_id)
                    assert more is not None
                    credit += more
                stream.send(pack_chunk(wire.InsertRequest, chunk))
                credit -= chunk.payload.nbytes
            stream.send(wire.InsertRequest(commit=wire.Commit(sample_id=sample_id)).SerializeToString())
            while _credit(stream.answer(), sample_id) is not None:
                pass
        except BaseException:
            self.close()
            raise
        return True

    def _open(self) -> _Stream:
        if self._stream is None:
            self._stream = _Stream(self._client)
            opening = wire.Open(
                wire_version=WIRE_VERSION, signature=write_signature(self._signature), producer=self._name
            )
            self._stream.send(wire.InsertRequest(open=opening).SerializeToString())
            self._stream.answer()
        return self._stream

    def _cut(self, sample_id: int, begin: wire.Begin, context: memoryview, last: memoryview) -> Iterator[FramedChunk]:
        signature = self._signature
        sizes = {
            "context": (context, len(begin.token_ids), signature.context_row_bytes),
            "last": (last, len(begin.last_rows), signature.last_row_bytes),
        }
        for name, (view, num_rows, row_bytes) in sizes.items():
            if view.nbytes != num_rows * row_bytes:
                raise WireError(
                    f"sample {sample_id}: {name} has {view.nbytes} bytes, {num_rows} rows of {row_bytes} are needed"
                )
        job = CaptureJob(
            capture=sample_id, prompt=0, epoch=0, input_ids=(), loss_mask=(), last_rows=tuple(begin.last_rows)
        )
        pieces = cut(
            context_rows=len(begin.token_ids),
            context_row_bytes=signature.context_row_bytes,
            last_rows=len(begin.last_rows),
            last_row_bytes=signature.last_row_bytes,
            chunk_bytes=max(DEFAULT_CHUNK_BYTES, signature.context_row_bytes),
        )
        return (self._framed(piece, job, *sizes[piece.tensor]) for piece in pieces)

    def _framed(self, piece: Any, job: CaptureJob, view: memoryview, num_rows: int, row_bytes: int) -> FramedChunk:
        payload = view[piece.row_start * row_bytes : piece.row_end * row_bytes]
        chunk = Chunk(
            tensor=piece.tensor,
            row_start=piece.row_start,
            row_end=piece.row_end,
            num_bytes=payload.nbytes,
            crc32c=crc32c(payload),
        )
        return FramedChunk(write_chunk(job, chunk, self._signature), payload)


class _Stream:
    """One Insert call."""

    def __init__(self, client: ReplayClient) -> None:
        self._client = client
        self._requests: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        call = client._channel.stream_stream(f"/{SERVICE}/Insert")
        try:
            self._answers = call(iter(self._requests.get, None), metadata=client._metadata)
        except ValueError as error:
            raise ReplayUnavailableError(f"replay service {client.address}, Insert: {error}") from error

    def send(self, message: bytes) -> None:
        self._requests.put(message)

    def answer(self) -> wire.InsertResponse:
        with self._client._patience.watch(self._answers.cancel) as wait:
            wait.begin(ANSWER_S)
            try:
                message: bytes | None = next(self._answers, None)
            except grpc.RpcError as error:
                raise self._client._failed(error, wait, "Insert") from error
        if message is None:
            raise WireError(f"replay service {self._client.address} ended an Insert without an answer")
        return parse(wire.InsertResponse, message)

    def close(self) -> None:
        self._requests.put(None)
        self._answers.cancel()


def _credit(answer: wire.InsertResponse, sample_id: int) -> int | None:
    """Bytes of credit; None says that the sample is committed."""
    kind = answer.WhichOneof("answer")
    if kind == "credit" and answer.credit.sample_id == sample_id:
        return answer.credit.num_bytes
    if kind == "committed" and answer.committed.sample_id == sample_id:
        return None
    raise WireError(f"the replay service answered {kind or 'nothing'} where credit for sample {sample_id} was due")


def _lease_request(
    count: int,
    lease_s: float,
    wait_s: float,
    rank: int,
    generation: int,
    captures: Sequence[int],
    *,
    with_chunks: bool,
) -> wire.LeaseRequest:
    return wire.LeaseRequest(
        rank=rank,
        generation=generation,
        count=count,
        lease_s=lease_s,
        max_wait_s=wait_s if math.isfinite(wait_s) else 0.0,
        sample_ids=captures,
        with_chunks=with_chunks,
    )


def _lease_in(message: bytes) -> SampleLease:
    response = parse(wire.LeaseResponse, message)
    if response.WhichOneof("item") != "lease":
        raise WireError("the replay service sent a chunk where a lease was due")
    return read_lease(response.lease)


def _receive(chunk: Chunk, lease: SampleLease, message: bytes | None, place: bytearray) -> None:
    """Append a chunk's payload to its tensor."""
    framed = unpack_chunk(wire.LeaseResponse, message) if message is not None else None
    name = f"lease {lease.lease_id}: rows {chunk.row_start} to {chunk.row_end} of {chunk.tensor}"
    if framed is None:
        raise WireError(f"{name} did not come")
    header = framed.header
    given = (header.sample_id, TENSOR_FROM_WIRE.get(header.tensor), header.row_start, header.row_end)
    if given != (lease.sample.job.capture, chunk.tensor, chunk.row_start, chunk.row_end):
        raise WireError(f"{name} were due, rows {header.row_start} to {header.row_end} of another chunk came")
    verify(chunk, framed.payload)
    place += framed.payload


def _names(leases: Sequence[LeaseName]) -> list[str]:
    return [lease.lease_id for lease in leases]
