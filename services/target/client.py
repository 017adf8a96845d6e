"""Client of one target. No torch here: payloads stay bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Self

import grpc

from services.contracts import (
    MAX_CHUNK_BYTES,
    WIRE_VERSION,
    CaptureJob,
    Chunk,
    Generation,
    TargetDescription,
    WireDtype,
)
from services.errors import (
    CaptureRequestError,
    FeatureError,
    SlipstreamError,
    TargetAccessError,
    TargetBusyError,
    TargetError,
    TargetStalledError,
    TargetUnavailableError,
    WireError,
)
from services.grpc_access import call_metadata, open_channel, why_refused
from services.grpc_errors import TOO_LARGE, TOO_LARGE_HERE
from services.security import Credentials
from services.target.framing import unpack
from services.target.patience import Patience
from services.target.request import DTYPE_TO_WIRE, LAST_ROWS_TO_WIRE, SERVICE
from services.target.stream import StreamCheck
from services.wire import target_pb2 as wire

HEADER_BYTES = 64 * 1024
"""Room for a chunk's metadata beside its payload."""

ERRORS: dict[grpc.StatusCode, type[SlipstreamError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: CaptureRequestError,
    grpc.StatusCode.DATA_LOSS: FeatureError,
    grpc.StatusCode.UNAVAILABLE: TargetUnavailableError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: TargetBusyError,
    grpc.StatusCode.DEADLINE_EXCEEDED: TargetStalledError,
    grpc.StatusCode.CANCELLED: TargetUnavailableError,
}
"""What a status means to a caller; any other is a TargetError."""


class TargetClient:
    """One channel to one target. Threads may share it; each capture is a stream of its own.

    Args:
        address: host:port.
        credentials: Token and certificate of the target; None for one on the loopback interface that asks for none.

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
                ("grpc.max_receive_message_length", MAX_CHUNK_BYTES + HEADER_BYTES),
                ("grpc.enable_http_proxy", 0),
                # Otherwise a new client of a restarted target inherits the old connection's back-off.
                ("grpc.use_local_subchannel_pool", 1),
            ],
        )
        self._patience = Patience()
        self._describe = self._channel.unary_unary(
            f"/{SERVICE}/Describe",
            request_serializer=wire.DescribeRequest.SerializeToString,
            response_deserializer=wire.DescribeResponse.FromString,
        )
        # No deserializer: gRPC would replace its errors' messages by one of its own.
        self._capture = self._channel.unary_stream(
            f"/{SERVICE}/Capture", request_serializer=wire.CaptureRequest.SerializeToString
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def describe(self, timeout_s: float = 30.0) -> TargetDescription:
        """Ask the target what it is.

        Raises:
            TargetUnavailableError: It does not answer in time.
            TargetAccessError: It does not take this token, or the two do not agree on TLS.
            WireError: It speaks another wire version.
            TargetError: What answers is no target.
        """
        try:
            answer = self._describe(wire.DescribeRequest(), timeout=timeout_s, metadata=self._metadata)
        except grpc.RpcError as error:
            raise self._translate(error, "Describe") from error
        if answer.wire_version != WIRE_VERSION:
            raise WireError(
                f"target {self.address} speaks wire version {answer.wire_version}, this is {WIRE_VERSION}: "
                "run the same Slipstream version on both ends"
            )
        return TargetDescription(
            model_name=answer.model_name,
            fingerprint=answer.fingerprint,
            num_layers=answer.num_layers,
            hidden_size=answer.hidden_size,
            vocab_size=answer.vocab_size,
            dtype=answer.dtype,
            max_tokens=answer.max_tokens,
            engine=answer.engine,
            wire_version=answer.wire_version,
        )

    def capture(
        self,
        job: CaptureJob,
        *,
        layer_ids: Sequence[int],
        wire_dtype: WireDtype,
        chunk_bytes: int,
        timeout_s: float,
        first_chunk_s: float | None = None,
        progress_s: float | None = None,
        on_answer: Callable[[Sequence[int]], None] | None = None,
    ) -> Iterator[tuple[Chunk, memoryview]]:
        """Stream the features of one job: its context chunks in row order, then those of the last hidden state.

        The generator ends only after every row came, once. Closing it early cancels the call. The deadline covers the
        whole stream, the caller's own pauses included.

        Args:
            job: Tokens and wanted rows; capture number and attempt label the chunks.
            layer_ids: Layers of the context features, in the order of their concatenation.
            wire_dtype: dtype of the payloads.
            chunk_bytes: Most bytes of one payload.
            timeout_s: Deadline of the whole capture, from the first `next`.
            first_chunk_s: Longest wait for the first chunk; None: `timeout_s` bounds it.
            progress_s: Longest wait for each further chunk, without the caller's pauses; likewise.
            on_answer: Called with the answer's token ids before the first chunk is yielded, if the job lets the target
                answer.

        Yields:
            The chunk's record and its payload, a read-only view that keeps the received message alive. The checksum is
            not checked yet: `services.checksum.verify` does.

        Raises:
            CaptureRequestError: The target cannot give what is asked.
            TargetUnavailableError: The target is dead or stopping; another may do.
            TargetBusyError: The target is full; it will take the capture later.
            TargetStalledError: The target is too slow, or hangs.
            TargetAccessError: It refuses this caller.
            FeatureError: The target's features are not finite.
            WireError: What came is not what was asked.
            TargetError: The target failed.
        """
        request = wire.CaptureRequest(
            wire_version=WIRE_VERSION,
            sample_id=job.capture,
            generation=job.attempt,
            token_ids=job.input_ids,
            layer_ids=layer_ids,
            last_rows=job.last_rows,
            dtype=DTYPE_TO_WIRE[wire_dtype],
            chunk_bytes=chunk_bytes,
            generate=_generate(job.generate) if job.generate else None,
        )
        check = StreamCheck(job, num_layers=len(layer_ids), dtype=wire_dtype, chunk_bytes=chunk_bytes)
        try:
            call = self._capture(request, timeout=timeout_s, metadata=self._metadata)
        except ValueError as error:  # all that gRPC raises here: this client was closed
            raise TargetUnavailableError(f"target {self.address}, Capture of sample {job.capture}: {error}") from error
        what = f"Capture of sample {job.capture} ({job.num_tokens} tokens)"
        num_chunks = 0
        with self._patience.watch(call.cancel) as wait:
            patience_s = min(first_chunk_s or timeout_s, timeout_s)
            try:
                wait.begin(patience_s)
                for message in call:
                    wait.end()
                    framed = unpack(message)
                    chunk = check.accept(framed)
                    if on_answer is not None and framed.header.answer_token_ids:
                        on_answer(tuple(framed.header.answer_token_ids))
                    yield chunk, framed.payload
                    num_chunks += 1
                    patience_s = min(progress_s or timeout_s, timeout_s)
                    wait.begin(patience_s)
                check.finish()
            except grpc.RpcError as error:
                if wait.is_over:
                    raise TargetStalledError(
                        f"target {self.address}, {what}: nothing came for {patience_s:g} s after {num_chunks} chunks. "
                        "If it is only slow, raise replay.first_chunk_s or replay.progress_s, or lower replay.pulls"
                    ) from error
                raise self._translate(error, what) from error
            finally:
                call.cancel()

    def close(self) -> None:
        """Close the channel; running captures end with TargetUnavailableError."""
        self._channel.close()

    def _translate(self, error: grpc.RpcError, what: str) -> SlipstreamError:
        if why := why_refused(error, self.address, self._credentials):
            return TargetAccessError(f"target {self.address} does not let us in: {why}")
        details, kind = error.details(), ERRORS.get(error.code(), TargetError)
        if TOO_LARGE_HERE in (details or ""):
            kind, details = WireError, f"{details}: a chunk has at most {MAX_CHUNK_BYTES} bytes"
        elif TOO_LARGE in (details or ""):
            kind, details = CaptureRequestError, f"{details}: the target takes shorter prompts; see its max_tokens"
        return kind(f"target {self.address}, {what}: {details} ({error.code().name})")


def run_client(address: str, credentials: Credentials | None) -> TargetClient:
    """A client of one of a run's targets: on the loopback interface it speaks no TLS, as the target there does."""
    return TargetClient(address, credentials.at(address.rpartition(":")[0]) if credentials else None)


def _generate(generation: Generation) -> wire.Generate:
    return wire.Generate(
        max_new_tokens=generation.max_new_tokens,
        temperature=generation.temperature,
        seed=generation.seed,
        stop_token_ids=generation.stop_token_ids,
        last_rows=LAST_ROWS_TO_WIRE[generation.last_rows],
    )
