"""The replay service: proto/replay.proto over one replay table, for producers and consumers anywhere. No torch."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import grpc
from google.protobuf.message import Message

from services.contracts import MAX_CHUNK_BYTES, SampleLease, TableSignature
from services.errors import (
    ReplayBusyError,
    ReplayError,
    ReplayUnavailableError,
    SlipstreamError,
    StaleGenerationError,
    TableLostError,
    UnknownSampleError,
    UsageError,
)
from services.grpc_errors import abort
from services.grpc_server import GrpcServer
from services.replay.config import ReplayConfig
from services.replay.connect import Client, claim, connect
from services.replay.insert_stream import Gone, InsertStream
from services.replay.intake import Intake
from services.replay.service_config import ServiceConfig
from services.replay.table import RedisTable
from services.replay.urls import without_password
from services.replay.wire import (
    MAX_MESSAGE_BYTES,
    MAX_TOKENS,
    SERVICE,
    WIRE_VERSION,
    LeaseRequest,
    pack_chunk,
    read_end,
    read_lease_request,
    read_rejections,
    write_chunk,
    write_lease,
    write_signature,
    write_table,
)
from services.security import Credentials, check_listening
from services.target.framing import FramedChunk
from services.target.patience import Patience
from services.wire import replay_pb2 as wire

logger = logging.getLogger(__name__)

SPARE_CALLS = 16
"""Calls served beyond the streams: Ack, Info, health checks, and streams being refused."""

HOUSEKEEPING_S = 0.5
LEASE_POLL_S = 0.01

KEEPALIVE = (("grpc.keepalive_time_ms", 30_000), ("grpc.keepalive_timeout_ms", 10_000))
"""A caller whose machine is gone says nothing: ask now and then."""

CLAIM_TTL_S = 30.0

WAYS_TO_LISTEN = (
    "Give credentials with a token, a certificate and its key; or insecure, on a network you trust; or listen on "
    "127.0.0.1 and forward the port over a channel you trust"
)


class RunningService:
    """A serving replay service; end it with `stop`.

    Attributes:
        address: host:port that clients connect to.
    """

    def __init__(self, server: GrpcServer, service: _Service, resources: contextlib.ExitStack) -> None:
        self.address = server.address
        self._server = server
        self._service = service
        self._resources = resources

    def check(self) -> None:
        """Raise what has ended the service's housekeeping, which nothing should."""
        self._service.check()

    def stop(self, grace_s: float = 0.0) -> None:
        """Refuse new calls, let samples that are on their way arrive for `grace_s` seconds, then end. Committed samples
        stay in Redis."""
        self._service.stopping.set()
        self._server.stop(grace_s)
        self._service.close()
        self._resources.close()


def serve(
    redis_url: str,
    prefix: str,
    replay: ReplayConfig,
    signature: TableSignature,
    config: ServiceConfig | None = None,
    address: str = "127.0.0.1:0",
    credentials: Credentials | None = None,
    *,
    owner: str,
    clock: Callable[[], float] = time.time,
) -> RunningService:
    """Serve a replay table; makes it, or goes on with the one that is there.

    Args:
        redis_url: The Redis that holds it, with its password.
        prefix: Of its keys; claimed for as long as the service lives.
        replay: Capacity, uses of a sample, rate limiter, selector.
        signature: What the table holds.
        config: Limits of the service.
        address: host:port; port 0 takes a free one.
        credentials: As for a target (`services.target.server.serve`).
        owner: Names this service to others that want the prefix; the same one may take it over at once.
        clock: Seconds.

    Raises:
        UsageError: The address is beyond the loopback interface, and the credentials lack token or TLS and are not
            `insecure`; or the signature's rows do not fit into a chunk.
        SignatureError: The table is there with another signature.
        ReplayError: Redis does not answer, another owner has the prefix, or the address cannot be bound.
    """
    config, credentials = config or ServiceConfig(), credentials or Credentials()
    check_listening(
        "the replay service",
        address.rpartition(":")[0],
        token=credentials.token is not None,
        tls=credentials.has_tls,
        insecure=credentials.insecure,
        ways=WAYS_TO_LISTEN,
    )
    if signature.context_row_bytes > MAX_CHUNK_BYTES:
        raise UsageError(
            f"one token's features take {signature.context_row_bytes} bytes, a chunk holds {MAX_CHUNK_BYTES}: name "
            "fewer layers, or a smaller dtype"
        )
    with contextlib.ExitStack() as resources:
        client = connect(redis_url)
        resources.callback(client.close)
        service = _Service(client, prefix, replay, signature, config, clock)
        try:
            server = GrpcServer(
                SERVICE,
                service.handler(),
                address,
                credentials,
                max_calls=config.max_inserts + config.max_leases + SPARE_CALLS,
                max_message_bytes=MAX_MESSAGE_BYTES,
                options=KEEPALIVE,
            )
        except RuntimeError as error:
            raise ReplayError(
                f"the replay service cannot listen on {address}: {error}; choose a free port, or 0"
            ) from error
        resources.callback(server.stop)
        # Not before the port is bound: who has the port is the owner, and may free what an earlier one left.
        resources.enter_context(claim(client, prefix, owner, CLAIM_TTL_S))
        service.begin()
        server.start()
        return RunningService(server, service, resources.pop_all())


class _Service:
    def __init__(
        self,
        client: Client,
        prefix: str,
        replay: ReplayConfig,
        signature: TableSignature,
        config: ServiceConfig,
        clock: Callable[[], float],
    ) -> None:
        self.stopping = threading.Event()
        self._prefix = prefix
        self._replay = replay
        self._signature = signature
        self._config = config
        self._clock = clock
        self._table = RedisTable(client, prefix)
        self._intake = Intake(client, prefix, signature, clock)
        self._patience = Patience()
        self._inserts = _Places("inserts", config.max_inserts, "--max-inserts")
        self._leases = _Places("leases", config.max_leases, "--max-leases")
        self._generation = 0
        self._defect: BaseException | None = None
        self._closed = threading.Event()
        self._housekeeper = threading.Thread(target=self._keep_house, name="housekeeping", daemon=True)

    def handler(self) -> grpc.GenericRpcHandler:
        def unary(answer: Callable[[bytes], Message]) -> grpc.RpcMethodHandler:
            return grpc.unary_unary_rpc_method_handler(
                _aborting(answer), response_serializer=lambda message: message.SerializeToString()
            )

        return grpc.method_handlers_generic_handler(
            SERVICE,
            {  # no deserializers: gRPC would answer bytes that are no message with INTERNAL
                "Info": unary(self.info),
                "Insert": grpc.stream_stream_rpc_method_handler(self.insert),
                "Lease": grpc.unary_stream_rpc_method_handler(self.lease),
                "Ack": unary(self.ack),
                "Release": unary(self.release),
                "UpdatePriorities": unary(self.update_priorities),
            },
        )

    def begin(self) -> None:
        """Make the table, free what an earlier service left half-done, and keep house from now on."""
        self._create()
        num_freed = self._intake.adopt()
        if num_freed:
            logger.warning("%d samples that were on their way when the service ended are freed", num_freed)
        self._housekeeper.start()

    def check(self) -> None:
        if self._defect is not None:
            raise self._defect

    def close(self) -> None:
        self._closed.set()
        self._housekeeper.join()
        with contextlib.suppress(ReplayError):  # Redis is away: the next service does it
            self._intake.keep_house()
        for table in (self._table, self._intake.table):
            table.close()

    def info(self, message: bytes) -> wire.InfoResponse:
        return wire.InfoResponse(
            wire_version=WIRE_VERSION,
            signature=write_signature(self._signature),
            table=write_table(self._table.info()),
            redis_url=without_password(self._config.chunks_url or ""),
            prefix=self._prefix,
            max_chunk_bytes=MAX_CHUNK_BYTES,
            max_tokens=MAX_TOKENS,
        )

    def insert(self, messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        def answers() -> Generator[bytes, None, None]:
            with self._inserts.one():
                stream = InsertStream(
                    messages,
                    context,
                    intake=self._intake,
                    signature=self._signature,
                    config=self._config,
                    reuse=self._replay.reuse,
                    stopping=self.stopping,
                )
                for answer in stream.answers():
                    yield answer.SerializeToString()

        return self._stream(answers(), context)

    def lease(self, message: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        def items() -> Generator[bytes, None, None]:
            with self._leases.one():
                request = read_lease_request(message)
                leases = self._wait_for(request, context)
                undelivered = leases
                try:
                    for lease in leases:
                        yield from self._deliver(lease, with_chunks=request.with_chunks)
                    undelivered = []
                finally:
                    self._give_back(undelivered, request.generation)

        return self._stream(items(), context)

    def ack(self, message: bytes) -> wire.AckResponse:
        request = read_end(wire.AckRequest, message)
        self._table.ack(request.leases, request.generation, self._clock())
        return wire.AckResponse()

    def release(self, message: bytes) -> wire.ReleaseResponse:
        request = read_end(wire.ReleaseRequest, message)
        self._table.release(request.leases, request.generation)
        return wire.ReleaseResponse()

    def update_priorities(self, message: bytes) -> wire.UpdatePrioritiesResponse:
        return wire.UpdatePrioritiesResponse(num_found=self._table.update_priorities(read_rejections(message)))

    def _stream(self, answers: Generator[bytes, None, None], context: grpc.ServicerContext) -> Iterator[bytes]:
        """Send answers for as long as their reader takes them, and the error that ends them."""
        with self._patience.watch(context.cancel) as wait, contextlib.closing(answers):
            try:
                for answer in answers:
                    wait.begin(self._config.progress_s)
                    yield answer
                    wait.end()
            except SlipstreamError as error:
                abort(context, error)
            except Gone:
                return

    def _wait_for(self, request: LeaseRequest, context: grpc.ServicerContext) -> list[SampleLease]:
        over = threading.Event()
        if not context.add_callback(over.set):
            return []
        deadline_s = time.monotonic() + min(request.max_wait_s, self._config.max_wait_s)
        while True:
            leases = self._table.lease(
                rank=request.rank,
                generation=request.generation,
                count=request.num_uses,
                now_s=self._clock(),
                lease_s=request.lease_s,
                captures=request.captures,
            )
            if leases or time.monotonic() >= deadline_s or self.stopping.is_set():
                return leases
            if over.wait(LEASE_POLL_S):
                raise Gone

    def _deliver(self, lease: SampleLease, *, with_chunks: bool) -> Iterator[bytes]:
        yield wire.LeaseResponse(lease=write_lease(lease)).SerializeToString()
        if not with_chunks:
            return
        job = lease.sample.job
        for index, chunk in enumerate(lease.sample.chunks):
            place = bytearray(chunk.num_bytes)
            self._table.read_into(job, index, place)
            yield pack_chunk(
                wire.LeaseResponse, FramedChunk(write_chunk(job, chunk, self._signature), memoryview(place))
            )

    def _give_back(self, leases: Sequence[SampleLease], generation: int) -> None:
        for lease in leases:
            try:
                self._table.release([lease], generation)
            except (UnknownSampleError, StaleGenerationError, TableLostError):
                continue  # it has ended by itself
            except ReplayUnavailableError as error:
                logger.warning("lease %s was not delivered and ends at its deadline: %s", lease.lease_id, error)

    def _keep_house(self) -> None:
        while not self._closed.wait(HOUSEKEEPING_S):
            try:
                if self._table.incarnation() is None:
                    logger.warning("Redis restarted empty: what it held is lost, and its producers may send it again")
                    self._create()
                self._generation = max(self._generation, self._table.generation() or 0)
                self._table.expire(self._clock())
                self._intake.keep_house()
            except ReplayError as error:
                logger.warning("the replay buffer is away: %s", error)
            except Exception as error:
                self._defect = error
                raise

    def _create(self) -> None:
        replay = self._replay
        self._table.create(replay.capacity, self._signature, replay.reuse, replay.rate_limiter, replay.sampling)
        with contextlib.suppress(StaleGenerationError):  # a newer group began just now
            self._table.set_generation(max(self._generation, self._table.generation() or 0))


class _Places:
    """How many calls of one kind may run at once."""

    def __init__(self, what: str, number: int, option: str) -> None:
        self._what = what
        self._number = number
        self._option = option
        self._free = threading.BoundedSemaphore(number)

    @contextlib.contextmanager
    def one(self) -> Iterator[None]:
        """Hold one.

        Raises:
            ReplayBusyError: All are taken.
        """
        if not self._free.acquire(blocking=False):
            raise ReplayBusyError(
                f"this replay service has {self._number} {self._what} at once already: try again, or raise "
                f"{self._option}"
            )
        try:
            yield
        finally:
            self._free.release()


def _aborting(answer: Callable[[bytes], Message]) -> Callable[[bytes, grpc.ServicerContext], Any]:
    def call(message: bytes, context: grpc.ServicerContext) -> Message:
        try:
            return answer(message)
        except SlipstreamError as error:
            abort(context, error)

    return call
