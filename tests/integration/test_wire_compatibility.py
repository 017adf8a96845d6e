"""What travels is plain protobuf: generated stubs against our server, our client against generated servicers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
import torch
from torch import Tensor

from services.checksum import crc32c, verify
from services.codec import byte_view, decode, pack_rows
from services.contracts import WIRE_VERSION, CaptureJob, TargetDescription, TensorName, WireDtype, hidden_state_bytes
from services.errors import CaptureRequestError, FeatureError, WireError
from services.target.client import TargetClient
from services.target.config import TargetConfig
from services.target.packing import CapturedFeatures
from services.target.request import DTYPE_TO_WIRE, SERVICE, CaptureInputs
from services.target.server import serve
from services.wire import target_pb2 as wire
from services.wire import target_pb2_grpc as wire_grpc

DTYPES: tuple[WireDtype, ...] = ("bf16", "fp16", "fp32", "fp8_e4m3")
LAYER_IDS, HIDDEN_SIZE, NUM_TOKENS, LAST_ROWS = (0, 2), 6, 7, (2, 5, 6)
WIDTHS: dict[TensorName, int] = {"context": len(LAYER_IDS) * HIDDEN_SIZE, "last": HIDDEN_SIZE}
WAIT_S = 120.0
JOB = CaptureJob(
    capture=2**40,
    attempt=3,
    prompt=0,
    epoch=0,
    input_ids=tuple(range(NUM_TOKENS)),
    loss_mask=(1,) * NUM_TOKENS,
    last_rows=LAST_ROWS,
)


def feature_rows() -> tuple[Tensor, Tensor]:
    """Context [T, L·D] and last rows [R, D] in float32; layers differ in size, as those of real models do."""
    context = torch.randn(NUM_TOKENS, len(LAYER_IDS), HIDDEN_SIZE, generator=torch.Generator().manual_seed(0))
    context[:, 1] *= 1000
    last = torch.randn(len(LAST_ROWS), HIDDEN_SIZE, generator=torch.Generator().manual_seed(1))
    return context.flatten(1), last


class Features:
    """An engine that gives `feature_rows`."""

    def __init__(self, spoil: Callable[[Tensor], None] = lambda context: None) -> None:
        self.spoil = spoil

    def describe(self) -> TargetDescription:
        return TargetDescription(
            model_name="features",
            fingerprint="f",
            num_layers=4,
            hidden_size=HIDDEN_SIZE,
            vocab_size=100,
            dtype="float32",
            max_tokens=100,
            engine="synthetic",
        )

    def capture(self, batch: list[CaptureInputs]) -> list[CapturedFeatures]:
        context, last = feature_rows()
        self.spoil(context)
        return [
            CapturedFeatures(pack_rows(context, one.dtype, HIDDEN_SIZE), pack_rows(last, one.dtype, HIDDEN_SIZE))
            for one in batch
        ]

    def check(self) -> None:
        pass


def request_of(dtype: WireDtype, **changes: object) -> wire.CaptureRequest:
    fields: dict[str, object] = {
        "wire_version": WIRE_VERSION,
        "sample_id": JOB.capture,
        "generation": JOB.attempt,
        "token_ids": JOB.input_ids,
        "layer_ids": LAYER_IDS,
        "last_rows": LAST_ROWS,
        "dtype": DTYPE_TO_WIRE[dtype],
        "chunk_bytes": chunk_bytes(dtype),
    }
    return wire.CaptureRequest(**{**fields, **changes})  # type: ignore[arg-type]


def chunk_bytes(dtype: WireDtype) -> int:
    """Room for three rows of context."""
    return 3 * len(LAYER_IDS) * hidden_state_bytes(HIDDEN_SIZE, dtype)


def as_they_travel(dtype: WireDtype) -> dict[TensorName, bytes]:
    context, last = feature_rows()
    return {
        "context": bytes(byte_view(pack_rows(context, dtype, HIDDEN_SIZE))),
        "last": bytes(byte_view(pack_rows(last, dtype, HIDDEN_SIZE))),
    }


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    running = serve(Features(), TargetConfig(model="features", num_gpus=0))
    yield running.address
    running.stop()


def received(client: TargetClient, dtype: WireDtype) -> dict[TensorName, bytes]:
    """What comes through our client, checksums verified."""
    came: dict[TensorName, bytes] = {"context": b"", "last": b""}
    stream = client.capture(
        JOB, layer_ids=LAYER_IDS, wire_dtype=dtype, chunk_bytes=chunk_bytes(dtype), timeout_s=WAIT_S
    )
    for chunk, payload in stream:
        verify(chunk, payload)
        came[chunk.tensor] += payload
    return came


@pytest.mark.parametrize("dtype", DTYPES)
def test_plain_stub_gets_our_servers_bytes_and_totals(server: str, dtype: WireDtype) -> None:
    with grpc.insecure_channel(server) as channel:
        chunks = list(wire_grpc.TargetStub(channel).Capture(request_of(dtype), timeout=WAIT_S))
    wanted = as_they_travel(dtype)
    assert {(chunk.sample_id, chunk.generation, chunk.dtype) for chunk in chunks} == {(2**40, 3, DTYPE_TO_WIRE[dtype])}
    assert [(chunk.tensor, chunk.row_start, chunk.row_end, chunk.row_width) for chunk in chunks] == [
        (wire.CONTEXT, 0, 2, 12),
        (wire.CONTEXT, 2, 4, 12),
        (wire.CONTEXT, 4, 7, 12),
        (wire.LAST, 0, 3, 6),
    ]
    assert b"".join(chunk.payload for chunk in chunks) == wanted["context"] + wanted["last"]
    assert all(chunk.crc32c == crc32c(chunk.payload) for chunk in chunks)
    totals = chunks[-1].totals
    assert (totals.num_chunks, totals.context_rows, totals.last_rows) == (4, 7, 3)
    assert totals.num_bytes == len(wanted["context"]) + len(wanted["last"])
    assert not any(chunk.HasField("totals") for chunk in chunks[:-1])


def test_plain_stub_undoes_the_scales_with_the_contract_alone(server: str) -> None:
    """As somebody does who has the `.proto` and no line of ours: D codes, then a float32, for each hidden state."""
    with grpc.insecure_channel(server) as channel:
        chunks = list(wire_grpc.TargetStub(channel).Capture(request_of("fp8_e4m3"), timeout=WAIT_S))
    payload = b"".join(chunk.payload for chunk in chunks if chunk.tensor == wire.CONTEXT)
    states = torch.frombuffer(bytearray(payload), dtype=torch.uint8).view(-1, HIDDEN_SIZE + 4)
    codes = states[:, :HIDDEN_SIZE].contiguous().view(torch.float8_e4m3fn).float()
    scales = states[:, HIDDEN_SIZE:].contiguous().view(torch.float32)
    context, _ = feature_rows()
    wanted = context.view(-1, HIDDEN_SIZE)
    assert ((codes * scales - wanted).abs() <= (wanted.abs() * 2**-4).clamp(min=float(scales.max()) * 2**-10)).all()
    assert torch.equal(codes * scales, decode(payload, "fp8_e4m3", 12, hidden_size=6).view(-1, HIDDEN_SIZE))


@pytest.mark.parametrize("dtype", DTYPES)
def test_our_client_gets_our_servers_bytes(server: str, dtype: WireDtype) -> None:
    with TargetClient(server) as client:
        assert received(client, dtype) == as_they_travel(dtype)


def messages(request: wire.CaptureRequest, dtype: WireDtype) -> Iterator[wire.FeatureChunk]:
    """The stream of a target that cuts one row a chunk."""
    rows = {tensor: WIDTHS[tensor] // HIDDEN_SIZE * hidden_state_bytes(HIDDEN_SIZE, dtype) for tensor in WIDTHS}
    packed = as_they_travel(dtype)
    number = NUM_TOKENS + len(LAST_ROWS)
    for tensor in ("context", "last"):
        for row in range(len(packed[tensor]) // rows[tensor]):
            payload = packed[tensor][row * rows[tensor] : (row + 1) * rows[tensor]]
            number -= 1
            chunk = wire.FeatureChunk(
                sample_id=request.sample_id,
                generation=request.generation,
                tensor=wire.CONTEXT if tensor == "context" else wire.LAST,
                row_start=row,
                row_end=row + 1,
                row_width=WIDTHS[tensor],
                dtype=request.dtype,
                crc32c=crc32c(payload),
                payload=payload,
            )
            if number == 0:
                chunk.totals.num_chunks = NUM_TOKENS + len(LAST_ROWS)
                chunk.totals.context_rows, chunk.totals.last_rows = NUM_TOKENS, len(LAST_ROWS)
                chunk.totals.num_bytes = sum(map(len, packed.values()))
            yield chunk


class Plain(wire_grpc.TargetServicer):
    """A target of generated code."""

    def __init__(self, dtype: WireDtype, wire_version: int = WIRE_VERSION) -> None:
        self.dtype, self.wire_version = dtype, wire_version

    def Describe(self, request: wire.DescribeRequest, context: grpc.ServicerContext) -> wire.DescribeResponse:
        return wire.DescribeResponse(model_name="plain", wire_version=self.wire_version)

    def Capture(self, request: wire.CaptureRequest, context: grpc.ServicerContext) -> Iterator[wire.FeatureChunk]:
        if request.wire_version != self.wire_version:  # as a target of that version does
            context.abort(
                grpc.StatusCode.INVALID_ARGUMENT,
                f"wire_version {request.wire_version} is not this target's {self.wire_version}: "
                "run the same Slipstream version on both ends",
            )
        yield from messages(request, self.dtype)


@pytest.fixture
def start() -> Iterator[Callable[[Callable[[grpc.Server], None]], str]]:
    servers: list[grpc.Server] = []

    def start(add: Callable[[grpc.Server], None]) -> str:
        server = grpc.server(ThreadPoolExecutor(2))
        add(server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        servers.append(server)
        return f"127.0.0.1:{port}"

    yield start
    for server in servers:
        server.stop(0).wait()


Start = Callable[[Callable[[grpc.Server], None]], str]


@pytest.mark.parametrize("dtype", DTYPES)
def test_our_client_gets_a_plain_servicers_bytes(start: Start, dtype: WireDtype) -> None:
    address = start(lambda server: wire_grpc.add_TargetServicer_to_server(Plain(dtype), server))
    with TargetClient(address) as client:
        assert received(client, dtype) == as_they_travel(dtype)


UNKNOWN = (
    b"\x98\x06\xac\x02"  # field 99, a number
    b"\xaa\x06\x07payload"  # field 101, bytes
    b"\xb5\x06\x01\x02\x03\x04"  # field 102, fixed32
)
"""Fields that a later version may add, on both sides of the payload's number."""


def rearranged(chunk: wire.FeatureChunk) -> bytes:
    """The same message with the payload first, the other fields in descending order, and unknown ones in between."""
    fields = [
        wire.FeatureChunk(**{descriptor.name: value}).SerializeToString()  # type: ignore[arg-type]
        for descriptor, value in reversed(chunk.ListFields())
    ]
    return UNKNOWN.join([b"", *fields, b""])


def test_our_client_takes_other_orders_and_unknown_fields(start: Start) -> None:
    def capture(message: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        for chunk in messages(wire.CaptureRequest.FromString(message), "fp8_e4m3"):
            yield rearranged(chunk)

    handler = grpc.method_handlers_generic_handler(SERVICE, {"Capture": grpc.unary_stream_rpc_method_handler(capture)})
    with TargetClient(start(lambda server: server.add_generic_rpc_handlers((handler,)))) as client:
        assert received(client, "fp8_e4m3") == as_they_travel("fp8_e4m3")


def test_our_server_takes_other_orders_and_unknown_fields(server: str) -> None:
    request = request_of("fp8_e4m3")
    parts = [
        wire.CaptureRequest(**{descriptor.name: value}).SerializeToString()  # type: ignore[arg-type]
        for descriptor, value in reversed(request.ListFields())
    ]
    message = UNKNOWN.join([b"", *parts, b""])
    with grpc.insecure_channel(server) as channel:
        capture = channel.unary_stream(f"/{SERVICE}/Capture", response_deserializer=wire.FeatureChunk.FromString)
        payload = b"".join(chunk.payload for chunk in capture(message, timeout=WAIT_S))
    assert payload == b"".join(as_they_travel("fp8_e4m3").values())


OLD = WIRE_VERSION - 1


def test_old_target_is_named_with_both_versions_and_the_way_out(start: Start) -> None:
    old = start(lambda server: wire_grpc.add_TargetServicer_to_server(Plain("bf16", OLD), server))
    with TargetClient(old) as client:
        with pytest.raises(WireError, match=f"target {old} speaks wire version {OLD}, this is {WIRE_VERSION}: run the"):
            client.describe(WAIT_S)
        with pytest.raises(CaptureRequestError, match=f"{WIRE_VERSION} .* {OLD}: run the same Slipstream version on"):
            received(client, "bf16")


def test_old_client_is_told_both_versions_and_the_way_out(server: str) -> None:
    with grpc.insecure_channel(server) as channel, pytest.raises(grpc.RpcError) as refused:
        list(wire_grpc.TargetStub(channel).Capture(request_of("bf16", wire_version=OLD), timeout=WAIT_S))
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert refused.value.details() == (
        f"the caller speaks wire version {OLD}, this target {WIRE_VERSION}: "
        "run the same Slipstream version on both ends"
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 3.4e38])
def test_features_that_no_scale_can_carry_are_refused(bad: float) -> None:
    def spoil(context: Tensor) -> None:
        context[4, 7] = bad

    running = serve(Features(spoil), TargetConfig(model="features", num_gpus=0))
    try:
        with TargetClient(running.address) as client, pytest.raises(FeatureError, match=r"1 of 7 rows .* first row 4"):
            received(client, "fp8_e4m3")
    finally:
        running.stop()
