"""The target service over real gRPC, and in real Ray actors: a tiny random Qwen3 answers."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import psutil
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM
from waiting import WAIT_S, wait_until

from services.buffers import LEAST_BYTES
from services.checksum import crc32c, verify
from services.codec import byte_view, decode
from services.contracts import WIRE_VERSION, CaptureJob, Event, TensorName, WireDtype
from services.errors import (
    CaptureRequestError,
    FeatureError,
    PlacementError,
    ReplayUnavailableError,
    TargetBusyError,
    TargetError,
    TargetStalledError,
    TargetUnavailableError,
    UsageError,
    WireError,
)
from services.target import pool as pool_module
from services.target.client import TargetClient
from services.target.config import TargetConfig
from services.target.engine import TransformersEngine
from services.target.packing import CapturedFeatures
from services.target.pool import TargetPool
from services.target.replica import Replica
from services.target.request import CaptureInputs
from services.target.server import RunningServer, serve
from services.wire import target_pb2 as wire
from services.wire import target_pb2_grpc as wire_grpc

LAYERS, WIDTH, VOCAB = 4, 16, 50
LAYER_IDS = (2, -1, 0)
ROW_BYTES = len(LAYER_IDS) * WIDTH * 4
LOAD_S = 300.0


def _save_qwen3(folder: Path, *, spoil: Callable[[Qwen3ForCausalLM], None] | None = None) -> Path:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=128,
        initializer_range=0.3,
    )
    model = Qwen3ForCausalLM(config).to(torch.bfloat16)
    if spoil is not None:
        with torch.no_grad():
            spoil(model)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _save_qwen3(tmp_path_factory.mktemp("qwen3"))


def _config(folder: Path, **changes: object) -> TargetConfig:
    return TargetConfig(model=str(folder), **{"dtype": "float32", "num_gpus": 0, "threads": 1, **changes})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def engine(folder: Path) -> TransformersEngine:
    return TransformersEngine(_config(folder))


@pytest.fixture(scope="module")
def server(folder: Path, engine: TransformersEngine) -> Iterator[RunningServer]:
    running = serve(engine, _config(folder))
    yield running
    running.stop()


@pytest.fixture
def client(server: RunningServer) -> Iterator[TargetClient]:
    with TargetClient(server.address) as client:
        yield client


def _job(length: int, *, capture: int = 1, last_rows: Sequence[int] | None = None) -> CaptureJob:
    generator = torch.Generator().manual_seed(length)
    return CaptureJob(
        capture=capture,
        attempt=2,
        prompt=0,
        epoch=0,
        input_ids=tuple(torch.randint(VOCAB, (length,), generator=generator).tolist()),
        loss_mask=(1,) * length,
        last_rows=tuple(range(1, length, 2)) if last_rows is None else tuple(last_rows),
    )


def _capture(
    client: TargetClient, job: CaptureJob, dtype: WireDtype = "fp32", chunk_bytes: int = 2 * ROW_BYTES
) -> tuple[Tensor, Tensor]:
    """Context [T, L·D] and last rows [R, D] as they come through the client, checksums verified."""
    pieces: dict[TensorName, list[Tensor]] = {"context": [], "last": [torch.empty(0, WIDTH)]}
    widths: dict[TensorName, int] = {"context": len(LAYER_IDS) * WIDTH, "last": WIDTH}
    for chunk, payload in client.capture(
        job, layer_ids=LAYER_IDS, wire_dtype=dtype, chunk_bytes=chunk_bytes, timeout_s=WAIT_S
    ):
        assert payload.nbytes <= chunk_bytes
        verify(chunk, payload)
        pieces[chunk.tensor].append(decode(payload, dtype, widths[chunk.tensor]))
    return torch.cat(pieces["context"]), torch.cat(pieces["last"])


def _expected(engine: TransformersEngine, job: CaptureJob, dtype: WireDtype = "fp32") -> CapturedFeatures:
    (features,) = engine.capture([CaptureInputs(job.input_ids, LAYER_IDS, job.last_rows, dtype)])
    return features


def test_describe_through_the_client(client: TargetClient, engine: TransformersEngine) -> None:
    assert client.describe(WAIT_S) == engine.describe()


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_capture_gives_the_engines_features_bit_for_bit(
    client: TargetClient, engine: TransformersEngine, dtype: WireDtype
) -> None:
    job = _job(11)
    context, last = _capture(client, job, dtype)
    expected = _expected(engine, job, dtype)
    assert torch.equal(context, expected.context)
    assert torch.equal(last, expected.last)


def test_captures_one_after_another_share_a_buffer(folder: Path) -> None:
    engine = TransformersEngine(_config(folder))
    running = serve(engine, _config(folder))
    pool = engine._room.pool
    job, dtypes = _job(9), ("fp32", "bf16", "fp16", "fp32")
    try:
        with TargetClient(running.address) as client:
            for dtype in dtypes:
                context, last = _capture(client, job, dtype)  # type: ignore[arg-type]
                wait_until(lambda: pool.free_bytes == LEAST_BYTES, "the buffer's return after the last chunk")
                expected = _expected(engine, job, dtype)  # type: ignore[arg-type]
                assert torch.equal(context, expected.context)
                assert torch.equal(last, expected.last)
                expected.release()
                assert pool.free_bytes == LEAST_BYTES
    finally:
        running.stop()


def test_capture_without_last_rows_ends_with_context(client: TargetClient, engine: TransformersEngine) -> None:
    job = _job(5, last_rows=())
    context, last = _capture(client, job)
    assert torch.equal(context, _expected(engine, job).context)
    assert last.shape == (0, WIDTH)


def test_concurrent_captures_share_forwards_and_stay_exact(folder: Path) -> None:
    batches: list[int] = []
    jobs = [_job(length, capture=length) for length in (3, 17, 9, 30, 5, 22, 14, 8)]

    class Counting(TransformersEngine):
        def capture(self, batch: list[CaptureInputs]) -> list[CapturedFeatures]:
            batches.append(len(batch))
            if len(batches) == 1:
                num_others = len(jobs) - len(batch)
                wait_until(lambda: running._dispatcher.num_waiting == num_others, "all captures during the first pass")
            return super().capture(batch)

    engine = Counting(_config(folder))
    running = serve(engine, _config(folder, max_batch_samples=4))
    with TargetClient(running.address) as client, ThreadPoolExecutor(len(jobs)) as threads:
        results = list(threads.map(lambda job: _capture(client, job), jobs))
    running.stop()
    assert sum(batches) == len(jobs)
    assert max(batches) == 4
    for job, (context, last) in zip(jobs, results, strict=True):
        expected = _expected(engine, job)
        torch.testing.assert_close(context, expected.context, rtol=0, atol=1e-5)
        torch.testing.assert_close(last, expected.last, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("job", "layer_ids", "chunk_bytes", "says"),
    [
        (_job(3), (3,), 1024, r"layer_ids \[3\] must lie between -1"),
        (_job(3, last_rows=(3,)), (0,), 1024, "row 3 of a sequence of 3 tokens"),
        (_job(129), (0,), 1024, "129 tokens are more than this target's max_tokens 128"),
        (_job(0), (0,), 1024, "token_ids is empty"),
        (_job(3).model_copy(update={"input_ids": (1, 50, 2)}), (0,), 1024, "token id 50 at position 1"),
        (_job(3), (0,), 1, "chunk_bytes 1 must lie between"),
    ],
)
def test_bad_request_is_refused_with_a_reason(
    client: TargetClient, job: CaptureJob, layer_ids: tuple[int, ...], chunk_bytes: int, says: str
) -> None:
    with pytest.raises(CaptureRequestError, match=says):
        list(client.capture(job, layer_ids=layer_ids, wire_dtype="fp32", chunk_bytes=chunk_bytes, timeout_s=WAIT_S))


@pytest.mark.parametrize(
    ("changes", "says"), [({"wire_version": 9}, "wire version 9"), ({"dtype": 5}, "dtype 5 is unknown")]
)
def test_plain_stub_is_told_invalid_argument(server: RunningServer, changes: dict[str, int], says: str) -> None:
    request = wire.CaptureRequest(wire_version=WIRE_VERSION, token_ids=[1], layer_ids=[0], dtype=wire.FP32)
    request.MergeFrom(wire.CaptureRequest(**changes))  # type: ignore[arg-type]
    with grpc.insecure_channel(server.address) as channel, pytest.raises(grpc.RpcError) as refused:
        list(wire_grpc.TargetStub(channel).Capture(request, timeout=WAIT_S))
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert says in refused.value.details()


def test_plain_stub_reads_our_server(server: RunningServer, engine: TransformersEngine) -> None:
    job = _job(9)
    request = wire.CaptureRequest(
        wire_version=WIRE_VERSION,
        sample_id=7,
        generation=3,
        token_ids=job.input_ids,
        layer_ids=LAYER_IDS,
        last_rows=job.last_rows,
        dtype=wire.BF16,
        chunk_bytes=ROW_BYTES,
    )
    with grpc.insecure_channel(server.address) as channel:
        stub = wire_grpc.TargetStub(channel)
        assert stub.Describe(wire.DescribeRequest(), timeout=WAIT_S).num_layers == LAYERS
        chunks = list(stub.Capture(request, timeout=WAIT_S))
    expected = _expected(engine, job, "bf16")
    assert {(chunk.sample_id, chunk.generation, chunk.dtype) for chunk in chunks} == {(7, 3, wire.BF16)}
    assert all(crc32c(chunk.payload) == chunk.crc32c for chunk in chunks)
    assert [chunk.HasField("totals") for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    payload = b"".join(chunk.payload for chunk in chunks)
    assert payload == bytes(byte_view(expected.context)) + bytes(byte_view(expected.last))
    totals = chunks[-1].totals
    assert (totals.num_chunks, totals.context_rows, totals.last_rows) == (len(chunks), 9, 4)
    assert totals.num_bytes == len(payload)


def test_plain_stub_may_leave_the_deadline_out(server: RunningServer) -> None:
    request = wire.CaptureRequest(wire_version=WIRE_VERSION, token_ids=[1, 2], layer_ids=[0], dtype=wire.FP32)
    with grpc.insecure_channel(server.address) as channel:
        chunks = list(wire_grpc.TargetStub(channel).Capture(request))
    assert chunks[-1].totals.context_rows == 2


def test_capture_of_a_closed_client_is_unavailable(server: RunningServer) -> None:
    client = TargetClient(server.address)
    stream = client.capture(_job(4), layer_ids=LAYER_IDS, wire_dtype="fp32", chunk_bytes=ROW_BYTES, timeout_s=WAIT_S)
    client.close()
    with pytest.raises(TargetUnavailableError, match="Cannot invoke RPC"):
        next(stream)


class PlainTarget(wire_grpc.TargetServicer):
    """A target written with nothing but the generated stubs: two context rows, one last row."""

    def __init__(self, *, wire_version: int = WIRE_VERSION, send_last: bool = True) -> None:
        self.wire_version = wire_version
        self.send_last = send_last
        self.requests: list[wire.CaptureRequest] = []

    def Describe(self, request: wire.DescribeRequest, context: grpc.ServicerContext) -> wire.DescribeResponse:
        return wire.DescribeResponse(model_name="plain", num_layers=4, wire_version=self.wire_version)

    def Capture(self, request: wire.CaptureRequest, context: grpc.ServicerContext) -> Iterator[wire.FeatureChunk]:
        self.requests.append(request)
        common = {"sample_id": request.sample_id, "generation": request.generation, "dtype": request.dtype}
        yield wire.FeatureChunk(
            **common, tensor=wire.CONTEXT, row_end=2, row_width=2, payload=b"12345678", crc32c=crc32c(b"12345678")
        )
        if self.send_last:
            totals = wire.Totals(num_chunks=2, context_rows=2, last_rows=1, num_bytes=12)
            yield wire.FeatureChunk(
                **common,
                tensor=wire.LAST,
                row_end=1,
                row_width=2,
                payload=b"abcd",
                crc32c=crc32c(b"abcd"),
                totals=totals,
            )


@pytest.fixture
def serve_plain() -> Iterator[Callable[[PlainTarget], str]]:
    servers: list[grpc.Server] = []

    def start(servicer: PlainTarget) -> str:
        server = grpc.server(ThreadPoolExecutor(2))
        wire_grpc.add_TargetServicer_to_server(servicer, server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        servers.append(server)
        return f"127.0.0.1:{port}"

    yield start
    for server in servers:
        server.stop(0).wait()


def test_our_client_reads_a_plain_stub_server(serve_plain: Callable[[PlainTarget], str]) -> None:
    plain, job = PlainTarget(), _job(2, last_rows=(1,))
    with TargetClient(serve_plain(plain)) as client:
        assert client.describe(WAIT_S).model_name == "plain"
        received = [
            (chunk.tensor, chunk.row_start, chunk.row_end, chunk.num_bytes, bytes(payload))
            for chunk, payload in client.capture(
                job, layer_ids=(-1,), wire_dtype="bf16", chunk_bytes=64, timeout_s=WAIT_S
            )
        ]
    assert received == [("context", 0, 2, 8, b"12345678"), ("last", 0, 1, 4, b"abcd")]
    (request,) = plain.requests
    assert tuple(request.token_ids) == job.input_ids
    assert tuple(request.layer_ids) == (-1,)
    assert (request.sample_id, request.generation, request.chunk_bytes) == (1, 2, 64)


def test_client_refuses_a_stream_that_lacks_rows(serve_plain: Callable[[PlainTarget], str]) -> None:
    address, job = serve_plain(PlainTarget(send_last=False)), _job(2, last_rows=(1,))
    with (
        TargetClient(address) as client,
        pytest.raises(WireError, match="the stream ended after 1 chunks without the final one"),
    ):
        list(client.capture(job, layer_ids=(0,), wire_dtype="bf16", chunk_bytes=64, timeout_s=WAIT_S))


def test_client_refuses_another_wire_version(serve_plain: Callable[[PlainTarget], str]) -> None:
    with (
        TargetClient(serve_plain(PlainTarget(wire_version=9))) as client,
        pytest.raises(WireError, match="speaks wire version 9, this is 2"),
    ):
        client.describe(WAIT_S)


def test_health_and_reflection_are_on(server: RunningServer) -> None:
    name = "slipstream.target.v1.Target"
    with grpc.insecure_channel(server.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("", name):
            answer = health.Check(health_pb2.HealthCheckRequest(service=service), timeout=WAIT_S)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        reflection = ProtoReflectionDescriptorDatabase(channel)
        assert {name, "grpc.health.v1.Health"} <= set(reflection.get_services())
        file = reflection.FindFileContainingSymbol(name)
    assert [method.name for method in file.service[0].method] == ["Describe", "Capture"]


class HeldEngine(TransformersEngine):
    """Computes for real, but each forward pass waits for the test."""

    def __init__(self, config: TargetConfig) -> None:
        super().__init__(config)
        self.entered = threading.Semaphore(0)
        self.proceed = threading.Semaphore(0)

    def capture(self, batch: list[CaptureInputs]) -> list[CapturedFeatures]:
        self.entered.release()
        assert self.proceed.acquire(timeout=WAIT_S)
        return super().capture(batch)


@pytest.fixture
def held(folder: Path) -> Iterator[tuple[HeldEngine, RunningServer]]:
    engine = HeldEngine(_config(folder))
    running = serve(engine, _config(folder, max_concurrent_captures=1))
    yield engine, running
    engine.proceed.release(100)
    running.stop()


def _answers_again(client: TargetClient) -> bool:
    try:
        context, _ = _capture(client, _job(4))
    except TargetBusyError as error:
        if "serves 1 captures at once already" not in str(error):
            raise
        return False
    return len(context) == 4


def test_one_capture_too_many_is_refused_until_a_slot_is_free(held: tuple[HeldEngine, RunningServer]) -> None:
    engine, running = held
    with TargetClient(running.address) as client, ThreadPoolExecutor(1) as threads:
        first = threads.submit(_capture, client, _job(6))
        assert engine.entered.acquire(timeout=WAIT_S)
        with pytest.raises(TargetBusyError, match=r"serves 1 captures at once already.*RESOURCE_EXHAUSTED"):
            _capture(client, _job(4))
        assert client.describe(WAIT_S).num_layers == LAYERS  # others are still served
        engine.proceed.release(2)
        assert len(first.result(WAIT_S)[0]) == 6
        assert len(_capture(client, _job(4))[0]) == 4  # at once: the slot was free before the first stream ended


def test_deadline_is_honoured_and_frees_the_slot(held: tuple[HeldEngine, RunningServer]) -> None:
    engine, running = held
    with TargetClient(running.address) as client:

        def runs_into_the_deadline() -> bool:
            """Again where the call, or its place before it was free again, came too late to be computed."""
            stream = client.capture(
                _job(6), layer_ids=LAYER_IDS, wire_dtype="fp32", chunk_bytes=ROW_BYTES, timeout_s=0.3
            )
            with (
                contextlib.suppress(TargetBusyError),
                pytest.raises(TargetStalledError, match=r"DEADLINE_EXCEEDED|nothing came for 0\.3 s"),
            ):
                list(stream)
            return engine.entered.acquire(blocking=False)

        wait_until(runs_into_the_deadline, "a pass that its caller does not wait for")
        engine.proceed.release(100)
        wait_until(lambda: _answers_again(client), "a free slot after the deadline")


def test_cancelled_capture_frees_its_slot_while_it_computes(held: tuple[HeldEngine, RunningServer]) -> None:
    engine, running = held
    request = wire.CaptureRequest(wire_version=WIRE_VERSION, token_ids=[1, 2], layer_ids=[0], dtype=wire.FP32)
    with grpc.insecure_channel(running.address) as channel, TargetClient(running.address) as client:
        call = wire_grpc.TargetStub(channel).Capture(request, timeout=WAIT_S)
        assert engine.entered.acquire(timeout=WAIT_S)
        call.cancel()
        # The pass of the cancelled call is still held, yet a new capture is let in and waits for its own pass.
        with ThreadPoolExecutor(1) as threads:
            again = threads.submit(wait_until, lambda: _answers_again(client), "a free slot after the cancellation")
            engine.proceed.release(1)
            assert engine.entered.acquire(timeout=WAIT_S)
            engine.proceed.release(1)
            again.result(WAIT_S)


def test_capture_closed_mid_stream_frees_its_slot(folder: Path, engine: TransformersEngine) -> None:
    running = serve(engine, _config(folder, max_concurrent_captures=1))
    job = _job(128)
    with TargetClient(running.address) as client:
        stream = client.capture(job, layer_ids=LAYER_IDS, wire_dtype="fp32", chunk_bytes=ROW_BYTES, timeout_s=WAIT_S)
        next(stream)
        stream.close()  # type: ignore[attr-defined]
        wait_until(lambda: _answers_again(client), "a free slot after the stream was closed")
    running.stop()


def test_stop_ends_a_waiting_capture_as_unavailable(folder: Path) -> None:
    engine = HeldEngine(_config(folder))
    running = serve(engine, _config(folder))
    with TargetClient(running.address) as client, ThreadPoolExecutor(2) as threads:
        waiting = threads.submit(_capture, client, _job(6))
        assert engine.entered.acquire(timeout=WAIT_S)
        stopping = threads.submit(running.stop)
        with pytest.raises(TargetUnavailableError):
            waiting.result(WAIT_S)
        engine.proceed.release(1)
        stopping.result(WAIT_S)
        with pytest.raises(TargetUnavailableError, match=running.address):
            client.describe(WAIT_S)


def test_features_that_are_not_finite_are_refused_at_the_source(tmp_path: Path) -> None:
    def spoil(model: Qwen3ForCausalLM) -> None:
        model.model.embed_tokens.weight[7, 3] = float("nan")

    bad = _config(_save_qwen3(tmp_path, spoil=spoil))
    running = serve(TransformersEngine(bad), bad)
    healthy, spoiled = (_job(3).model_copy(update={"input_ids": (1, token, 2)}) for token in (8, 7))
    with TargetClient(running.address) as client:
        with pytest.raises(FeatureError, match=r"context of sample 1: \d of 3 rows hold NaN"):
            _capture(client, spoiled)
        assert torch.isfinite(_capture(client, healthy)[0]).all()
    running.stop()


def test_features_that_overflow_the_wire_dtype_are_refused(tmp_path: Path) -> None:
    def spoil(model: Qwen3ForCausalLM) -> None:
        model.model.embed_tokens.weight[7, 3] = 1e6

    big = _config(_save_qwen3(tmp_path, spoil=spoil))
    running = serve(TransformersEngine(big), big)
    job = _job(3).model_copy(update={"input_ids": (1, 7, 2)})
    with TargetClient(running.address) as client:
        assert _capture(client, job, "fp32")[0].max() >= 9e5
        with pytest.raises(FeatureError, match="float16"):
            _capture(client, job, "fp16")
    running.stop()


def test_serve_refuses_to_listen_beyond_loopback(folder: Path, engine: TransformersEngine) -> None:
    with pytest.raises(UsageError, match=r"'0\.0\.0\.0' is not on the loopback interface"):
        serve(engine, _config(folder), "0.0.0.0:0")


def test_serve_refuses_a_taken_port(folder: Path, engine: TransformersEngine, server: RunningServer) -> None:
    with pytest.raises(TargetError, match=f"cannot listen on {server.address}"):
        serve(engine, _config(folder), server.address)


def test_client_says_which_address_does_not_answer() -> None:
    with (
        TargetClient("127.0.0.1:9") as client,
        pytest.raises(TargetUnavailableError, match=r"target 127\.0\.0\.1:9, Describe.*UNAVAILABLE"),
    ):
        client.describe(WAIT_S)


@pytest.fixture
def no_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    """A target that a busy machine keeps from answering for a while is not gone."""
    monkeypatch.setattr(pool_module, "SILENCE_S", LOAD_S)


@pytest.fixture(scope="module")
def own_ray() -> Iterator[None]:
    """A cluster of this file's own: its tests kill actors."""
    import ray

    from trainer.cluster import start_local_ray

    start_local_ray(
        num_cpus=1,
        num_gpus=0,
        object_store_memory=80 * 1024**2,
    )
    yield
    ray.shutdown()


class Board:
    """Where a pool publishes; refuses while `down`, as a replay buffer does whose Redis restarts."""

    def __init__(self) -> None:
        self.addresses: list[str] = []
        self.count = 0
        self.down = False
        self.quarantined: dict[str, str] = {}

    def __call__(self, addresses: Sequence[str]) -> dict[str, str]:
        if self.down:
            raise ReplayUnavailableError("Redis does not answer")
        self.addresses = list(addresses)
        self.count += 1
        return self.quarantined


def _process_at(address: str) -> psutil.Process:
    port = int(address.rpartition(":")[2])
    (pid,) = {
        connection.pid
        for connection in psutil.net_connections("tcp")
        if connection.laddr.port == port and connection.status == psutil.CONN_LISTEN
    }
    return psutil.Process(pid)


@pytest.mark.usefixtures("own_ray", "no_silence")
def test_pool_serves_and_survives_the_death_of_a_target(folder: Path, engine: TransformersEngine) -> None:
    board = Board()
    pool = TargetPool(_config(folder, replicas=2), board)
    pool.start()
    try:
        addresses = pool.wait_ready(LOAD_S)
        assert len(set(addresses)) == 2
        assert pool.describe() == engine.describe()
        wait_until(lambda: sorted(board.addresses) == sorted(addresses), "publication of both addresses")
        job = _job(8)
        for address in addresses:
            with TargetClient(address) as client:
                assert torch.equal(_capture(client, job)[0], _expected(engine, job).context)
        assert pool.events() == []

        process = _process_at(addresses[0])
        with TargetClient(addresses[0]) as client, ThreadPoolExecutor(1) as threads:
            client.describe(WAIT_S)
            process.suspend()  # so that the capture is surely under way when the process dies
            cut_off = threads.submit(_capture, client, job)
            wait_until(cut_off.running, "a capture under way")
            process.kill()
            with pytest.raises(TargetUnavailableError, match="UNAVAILABLE"):
                cut_off.result(WAIT_S)
        wait_until(lambda: addresses[0] not in board.addresses, "publication without the dead target")
        wait_until(lambda: len(board.addresses) == 2, "the restart of the dead target", timeout_s=LOAD_S)
        (reborn,) = set(board.addresses) - {addresses[1]}
        assert reborn != addresses[0]
        with TargetClient(reborn) as client:
            assert torch.equal(_capture(client, job)[0], _expected(engine, job).context)
        events = pool.events()
        assert [event.kind for event in events] == ["gone", "restart"]
        assert addresses[0] in events[0].message
        assert reborn in events[1].message
        assert pool.events() == []  # drained

        board.down = True
        seen: list[Event] = []
        wait_until(lambda: bool(seen.extend(pool.events()) or seen), "an event of the failed publication")
        assert [event.kind for event in seen] == ["unpublished"]
        count, board.down = board.count, False
        wait_until(lambda: board.count > count, "publication after Redis came back")
    finally:
        pool.stop()
    for address in board.addresses:
        with TargetClient(address) as client:
            wait_until(lambda client=client: _is_down(client), "the end of a stopped target")  # type: ignore[misc]


def _is_down(client: TargetClient) -> bool:
    try:
        client.describe(WAIT_S)
    except TargetUnavailableError:
        return True
    return False


@pytest.mark.usefixtures("own_ray", "no_silence")
def test_pool_reports_a_target_that_fails_to_load_however_slowly_its_process_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_module, "PLACEMENT_TIMEOUT_S", 0.0)
    pool = TargetPool(_config(_save_qwen3(tmp_path)), Board())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    pool.start()
    try:
        with pytest.raises(TargetError, match="cannot be loaded"):
            pool.wait_ready(LOAD_S)
    finally:
        pool.stop()


@pytest.mark.usefixtures("own_ray", "no_silence")
def test_added_target_that_fails_to_load_harms_no_other_and_is_replaced(tmp_path: Path) -> None:
    import ray

    pool = TargetPool(_config(_save_qwen3(tmp_path), num_cpus=0.5), Board())
    pool.start()
    try:
        (address,) = pool.wait_ready(LOAD_S)
        weights = tmp_path / "model.safetensors"
        whole = weights.read_bytes()
        weights.write_bytes(whole[:-100])
        pool.scale(2)
        wait_until(lambda: _states(pool) == {0: "serving", 1: "failed"}, "the failure of the added target", LOAD_S)
        pool.check()
        assert "cannot be loaded" in pool.states()[1].message
        wait_until(lambda: ray.available_resources().get("CPU") == 0.5, "the half CPU that it had")
        weights.write_bytes(whole)
        pool.scale(2)
        wait_until(lambda: _states(pool) == {0: "serving", 2: "serving"}, "the target in its place", LOAD_S)
        pool.scale(1)
        wait_until(lambda: _states(pool) == {0: "serving"}, "the end of the newest target")
        assert pool.addresses() == [address]
        # A slow machine may say that one is pending.
        kinds = [event.kind for event in pool.events() if event.kind != "pending"]
        assert kinds == ["scaling", "failed", "scaling", "serving", "scaling", "drained"]
    finally:
        pool.stop()


@pytest.mark.usefixtures("own_ray", "no_silence")
def test_targets_scaled_down_while_they_load_and_up_while_they_drain(folder: Path) -> None:
    pool = TargetPool(_config(folder, num_cpus=0.5), Board())  # the cluster has room for two
    pool.start()
    try:
        pool.wait_ready(LOAD_S)
        with pool._changed:  # the watcher stands still
            pool.scale(2, "made up")
            pool.scale(1)
            assert _states(pool) == {0: "serving"}, "what loads gives nothing, and ends at once"
        pool.scale(2)
        wait_until(lambda: _states(pool) == {0: "serving", 2: "serving"}, "the second target", LOAD_S)
        with pool._changed:
            pool.scale(1)
            pool.scale(2)
            assert _states(pool) == {0: "serving", 2: "draining", 3: "pending"}
            assert len(pool.addresses()) == 1
        wait_until(lambda: _states(pool) == {0: "serving", 3: "serving"}, "what takes the drained one's place", LOAD_S)
        pool.scale(2)
        events = pool.events()
    finally:
        pool.stop()
    assert [event.message for event in events if event.kind == "scaling"] == [
        "targets scaled from 1 to 2: made up",
        "targets scaled from 2 to 1",
        "targets scaled from 1 to 2",
        "targets scaled from 2 to 1",
        "targets scaled from 1 to 2",
    ]
    # A slow machine may say that the last one is pending.
    kinds = [event.kind for event in events if event.kind not in ("scaling", "pending")]
    assert kinds == ["serving", "drained", "serving"]


def _states(pool: TargetPool) -> dict[int, str]:
    return {target.index: target.state for target in pool.states()}


def test_target_that_was_back_before_the_watcher_looked_is_said_to_have_been_gone(folder: Path) -> None:
    pool = TargetPool(_config(folder), Board())
    replica = Replica(0, None, asked_s=0.0, address="here:1", last_address="here:1")
    pool._welcome(replica, "here:2")
    assert [event.kind for event in pool.events()] == ["gone", "restart"]
    assert (replica.state, replica.record().address) == ("serving", "here:2")


@pytest.mark.usefixtures("own_ray", "no_silence")
def test_pool_names_the_resource_that_is_missing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "PLACEMENT_TIMEOUT_S", 1.0)
    pool = TargetPool(_config(folder, num_gpus=1), Board())
    pool.start()
    try:
        with pytest.raises(PlacementError, match=r"targets \[0\] of 1 .* asks for 1 GPU, the cluster has 0 in all"):
            pool.wait_ready(LOAD_S)
    finally:
        pool.stop()
