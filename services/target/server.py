"""The gRPC server of one target: Describe and Capture of proto/target.proto, health checking and reflection."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError

import grpc
from google.protobuf.message import DecodeError

from services.checksum import crc32c
from services.codec import byte_view, check_packed
from services.errors import CaptureRequestError, DeadlineError, SlipstreamError, TargetBusyError, TargetError
from services.grpc_errors import abort
from services.grpc_server import GrpcServer
from services.security import Credentials, check_listening
from services.target.chunking import cut
from services.target.config import TargetConfig
from services.target.dispatcher import Dispatcher
from services.target.engine import Engine
from services.target.framing import FramedChunk, pack
from services.target.packing import CapturedFeatures
from services.target.request import DTYPE_TO_WIRE, SERVICE, TENSOR_TO_WIRE, CaptureRequest, read_request
from services.wire import target_pb2 as wire

SPARE_RPCS = 8
"""Calls served beyond the captures: Describe, health checks, reflection, and captures being refused."""

FORWARD_TIMEOUT_S = 600.0
"""Longest wait of a capture for its forward pass; its caller's own deadline may be nearer, or none."""

LONGEST_CALL_S = 1800.0
"""A capture is cut off after this, whatever its caller's deadline: who reads no more must not hold a place for ever."""

REQUEST_ROOM_BYTES = 1024**2
NUMBER_BYTES = 5
"""A request is two lists of at most `max_tokens` numbers, and little beside them."""

WAYS_TO_LISTEN = (
    "Give credentials with a token, a certificate and its key; or insecure, on a network you trust; or listen on "
    "127.0.0.1 and forward the port over a channel you trust"
)


class RunningServer:
    """A serving target; stop it with `stop`.

    Attributes:
        address: host:port that clients connect to.
    """

    def __init__(
        self,
        server: GrpcServer,
        dispatcher: Dispatcher[CapturedFeatures],
        places: _Places,
    ) -> None:
        self.address = server.address
        self._server = server
        self._dispatcher = dispatcher
        self._places = places

    def turn_away(self) -> None:
        """Take no new capture, and say so as a full target does: a caller that just chose this one asks another."""
        self._places.close()

    def stop(self, grace_s: float = 0.0) -> None:
        """Refuse new calls, let running ones go on for `grace_s` seconds, then end them and the server."""
        self._server.stop(grace_s)
        self._dispatcher.close()


def serve(
    engine: Engine, config: TargetConfig, address: str = "127.0.0.1:0", credentials: Credentials | None = None
) -> RunningServer:
    """Serve an engine.

    Args:
        engine: What computes; its `capture` is called from one thread only.
        config: Batching and concurrency limits.
        address: host:port; port 0 takes a free one.
        credentials: Token, certificate and key; those that are missing are not asked for, or not used. Health checking
            and reflection need the token, too.

    Raises:
        UsageError: The address is beyond the loopback interface, and the credentials lack token or TLS and are not
            `insecure`.
        TargetError: The address cannot be bound.
    """
    host = address.rpartition(":")[0]
    credentials = credentials or Credentials()
    check_listening(
        "the target",
        host,
        token=credentials.token is not None,
        tls=credentials.has_tls,
        insecure=credentials.insecure,
        ways=WAYS_TO_LISTEN,
    )
    dispatcher: Dispatcher[CapturedFeatures] = Dispatcher(
        engine.capture,
        max_batch_tokens=config.max_batch_tokens,
        max_batch_samples=config.max_batch_samples,
        batch_wait_s=config.batch_wait_ms / 1000,
    )
    places = _Places(config.max_concurrent_captures)
    try:
        server = GrpcServer(
            SERVICE,
            _Service(engine, dispatcher, places).handler(),
            address,
            credentials,
            max_calls=config.max_concurrent_captures + SPARE_RPCS,
            max_message_bytes=REQUEST_ROOM_BYTES + 2 * NUMBER_BYTES * engine.describe().max_tokens,
        )
    except RuntimeError as error:
        dispatcher.close()
        raise TargetError(f"target cannot listen on {address}: {error}; choose a free port, or 0") from error
    server.start()
    return RunningServer(server, dispatcher, places)


class _Places:
    """How many captures run, and whether one more may."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._num_taken = 0
        self._is_closed = False
        self._lock = threading.Lock()

    def take(self) -> None:
        """Take a place; `leave` gives it back.

        Raises:
            TargetBusyError: All are taken, or the target is about to end.
        """
        with self._lock:
            if self._is_closed:
                raise TargetBusyError("this target is about to end: ask another target")
            if self._num_taken == self._count:
                raise TargetBusyError(
                    f"this target serves {self._count} captures at once already: try again, ask another target, or "
                    "raise target.max_concurrent_captures"
                )
            self._num_taken += 1

    def leave(self) -> None:
        with self._lock:
            self._num_taken -= 1

    def close(self) -> None:
        """Let nobody in any more."""
        with self._lock:
            self._is_closed = True


class _Service:
    def __init__(self, engine: Engine, dispatcher: Dispatcher[CapturedFeatures], places: _Places) -> None:
        self._target = engine.describe()
        self._dispatcher = dispatcher
        self._places = places

    def handler(self) -> grpc.GenericRpcHandler:
        return grpc.method_handlers_generic_handler(
            SERVICE,
            {  # no deserializers: gRPC would answer bytes that are no message with INTERNAL
                "Describe": grpc.unary_unary_rpc_method_handler(
                    self.describe, response_serializer=wire.DescribeResponse.SerializeToString
                ),
                "Capture": grpc.unary_stream_rpc_method_handler(self.capture, response_serializer=pack),
            },
        )

    def describe(self, message: bytes, context: grpc.ServicerContext) -> wire.DescribeResponse:
        return wire.DescribeResponse(**self._target.model_dump())

    def capture(self, message: bytes, context: grpc.ServicerContext) -> Iterator[FramedChunk]:
        try:
            self._places.take()
        except TargetBusyError as error:
            abort(context, error)
        watch: threading.Timer | None = None
        try:
            watch = _cut_off_after(LONGEST_CALL_S, context)
            request = read_request(_parse(message), self._target)
            features = self._compute(request, context)
            if features is not None:
                try:
                    features.wait()
                    self._check(request, features)
                    # A chunk is serialized before the next one is asked for, so nothing reads the memory afterwards.
                    yield from _chunks(request, features, self._target.hidden_size)
                finally:
                    features.release()
        except SlipstreamError as error:
            abort(context, error)
        finally:
            if watch is not None:
                watch.cancel()
            self._places.leave()

    def _compute(self, request: CaptureRequest, context: grpc.ServicerContext) -> CapturedFeatures | None:
        """The features; None if the caller gave up."""
        # Of a call without a deadline gRPC says that 292 billion years remain, which no lock can wait.
        timeout_s = min(context.time_remaining(), FORWARD_TIMEOUT_S)
        ticket = self._dispatcher.submit(request.inputs)
        if not context.add_callback(lambda: self._dispatcher.cancel(ticket)):
            self._dispatcher.cancel(ticket)
        try:
            return ticket.future.result(timeout_s)
        except CancelledError:
            return None
        except TimeoutError as error:
            self._dispatcher.cancel(ticket)
            raise DeadlineError(
                f"no forward pass for {request.inputs.num_tokens} tokens within {timeout_s:.1f} s: "
                "the target has more captures than it can compute"
            ) from error

    def _check(self, request: CaptureRequest, features: CapturedFeatures) -> None:
        """Refuse features that are not finite."""
        dtype, hidden_size, name = request.inputs.dtype, self._target.hidden_size, f"sample {request.sample_id}"
        check_packed(features.context, dtype, hidden_size, f"context of {name}")
        check_packed(features.last, dtype, hidden_size, f"last hidden state of {name}")


def _parse(message: bytes) -> wire.CaptureRequest:
    try:
        return wire.CaptureRequest.FromString(message)
    except DecodeError as error:
        raise CaptureRequestError(
            f"these {len(message)} bytes are no CaptureRequest of proto/target.proto: {error}"
        ) from error


def _cut_off_after(seconds: float, context: grpc.ServicerContext) -> threading.Timer | None:
    """End a call from outside that may still run then: its own thread can be waiting for a caller who reads no more."""
    if context.time_remaining() <= seconds:
        return None
    timer = threading.Timer(seconds, context.cancel)
    timer.daemon = True
    timer.start()
    return timer


def _chunks(request: CaptureRequest, features: CapturedFeatures, hidden_size: int) -> Iterator[FramedChunk]:
    tensors = {"context": features.context, "last": features.last}
    views = {name: byte_view(tensor) for name, tensor in tensors.items()}
    row_bytes = {name: tensor.shape[1] * tensor.element_size() for name, tensor in tensors.items()}
    row_width = {"context": len(request.inputs.layer_ids) * hidden_size, "last": hidden_size}
    pieces = list(
        cut(
            context_rows=len(features.context),
            context_row_bytes=row_bytes["context"],
            last_rows=len(features.last),
            last_row_bytes=row_bytes["last"],
            chunk_bytes=request.chunk_bytes,
        )
    )
    for number, piece in enumerate(pieces, start=1):
        width = row_bytes[piece.tensor]
        payload = views[piece.tensor][piece.row_start * width : piece.row_end * width]
        header = wire.FeatureChunk(
            sample_id=request.sample_id,
            generation=request.generation,
            tensor=TENSOR_TO_WIRE[piece.tensor],
            row_start=piece.row_start,
            row_end=piece.row_end,
            row_width=row_width[piece.tensor],
            dtype=DTYPE_TO_WIRE[request.inputs.dtype],
            crc32c=crc32c(payload),
        )
        if number == len(pieces):
            header.totals.num_chunks = len(pieces)
            header.totals.context_rows = len(features.context)
            header.totals.last_rows = len(features.last)
            header.totals.num_bytes = sum(view.nbytes for view in views.values())
        if number == 1:
            header.answer_token_ids.extend(features.answer)
        yield FramedChunk(header, payload)
