"""Targets that answer wrongly, in every way there is, over real gRPC: what the user reads, and that nothing is lost.

Each row's target is the only one. It must be quarantined for a reason that says what it did; then, as the driver does,
it is replaced by one that is well, and every capture must be made there. Nothing may leak on either side.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc
import pytest
import torch
from waiting import wait_until

from services.checksum import crc32c
from services.codec import byte_view
from services.contracts import CaptureJob, Chunk, SampleLease, TableSignature, TargetDescription
from services.replay import shard as shard_module
from services.replay import targets as targets_module
from services.replay.audit import audit_table
from services.replay.config import ReplayConfig
from services.replay.connect import Client, connect
from services.replay.embedded import EmbeddedRedis
from services.replay.reader import ReplayReader
from services.replay.registry import TargetRegistry
from services.replay.shard import ReplayShard
from services.replay.table import RedisTable
from services.replay.work import WorkQueue
from services.target.chunking import cut
from services.target.client import TargetClient
from services.target.config import TargetConfig
from services.target.packing import CapturedFeatures
from services.target.request import DTYPE_TO_WIRE, SERVICE, TENSOR_TO_WIRE, CaptureInputs
from services.target.server import serve
from services.telemetry import TelemetryReader
from services.wire import target_pb2 as wire

SIGNATURE = TableSignature(fingerprint="f", layer_ids=(0, 2), hidden_size=4, dtype="bf16")
PREFIX = "run"
TOKENS = 6
NUM_CAPTURES = 8
PULLS = 3
WAIT_S = 120.0
PATIENCE_S = 1.5
"""Of a shard with a target that says nothing; for any other it waits as long as a busy machine may need."""

Chunks = list[wire.FeatureChunk]
Lie = Callable[[Chunks, grpc.ServicerContext], Iterator[bytes]]


def features(capture: int) -> tuple[torch.Tensor, torch.Tensor]:
    """context [T, 8] and last [2, 4], different for each capture."""
    context = torch.arange(TOKENS * 8).reshape(-1, 8) + 100 * capture
    last = torch.arange(2 * 4).reshape(-1, 4) - 100 * capture
    return context.to(torch.bfloat16), last.to(torch.bfloat16)


def make_job(capture: int) -> CaptureJob:
    ids = tuple(range(capture, capture + TOKENS))
    mask = (0,) * (TOKENS - 3) + (1, 1, 1)
    return CaptureJob(capture=capture, prompt=capture, epoch=0, input_ids=ids, loss_mask=mask, last_rows=(3, 4))


def description(**changes: object) -> wire.DescribeResponse:
    plain = TargetDescription(
        model_name="fake",
        fingerprint="f",
        num_layers=4,
        hidden_size=4,
        vocab_size=1000,
        dtype="bfloat16",
        max_tokens=100,
        engine="fake",
    )
    return wire.DescribeResponse(**(plain.model_dump() | changes))


def honest_chunks(request: wire.CaptureRequest) -> Chunks:
    """What a target that is well answers: three chunks of two context rows, one of two last rows."""
    tensors = dict(zip(("context", "last"), features(request.sample_id), strict=True))
    pieces = list(
        cut(context_rows=TOKENS, context_row_bytes=16, last_rows=2, last_row_bytes=8, chunk_bytes=request.chunk_bytes)
    )
    chunks = [
        wire.FeatureChunk(
            sample_id=request.sample_id,
            generation=request.generation,
            tensor=TENSOR_TO_WIRE[piece.tensor],
            row_start=piece.row_start,
            row_end=piece.row_end,
            row_width=tensors[piece.tensor].shape[1],
            dtype=DTYPE_TO_WIRE["bf16"],
            payload=bytes(byte_view(tensors[piece.tensor][piece.row_start : piece.row_end].contiguous())),
        )
        for piece in pieces
    ]
    for chunk in chunks:
        chunk.crc32c = crc32c(chunk.payload)
    num_bytes = sum(len(chunk.payload) for chunk in chunks)
    chunks[-1].totals.CopyFrom(
        wire.Totals(num_chunks=len(chunks), context_rows=TOKENS, last_rows=2, num_bytes=num_bytes)
    )
    return chunks


def tell(chunks: Chunks) -> Iterator[bytes]:
    return (chunk.SerializeToString() for chunk in chunks)


def honestly(chunks: Chunks, context: grpc.ServicerContext) -> Iterator[bytes]:
    return tell(chunks)


def changing(change: Callable[[Chunks], object]) -> Lie:
    """A lie that changes the honest chunks before they are sent."""

    def lie(chunks: Chunks, context: grpc.ServicerContext) -> Iterator[bytes]:
        change(chunks)
        return tell(chunks)

    return lie


def with_payload(chunk: wire.FeatureChunk, payload: bytes) -> None:
    chunk.payload, chunk.crc32c = payload, crc32c(payload)


def spoil(chunk: wire.FeatureChunk, bits: int) -> None:
    """Set the second value of a payload, with the checksum that goes with it."""
    with_payload(chunk, chunk.payload[:2] + bits.to_bytes(2, "little") + chunk.payload[4:])


def halve_width(chunks: Chunks) -> None:
    for chunk in chunks:
        chunk.row_width //= 2
        with_payload(chunk, chunk.payload[: len(chunk.payload) // 2])
    chunks[-1].totals.num_bytes //= 2


def flip_bit(chunks: Chunks) -> None:
    chunks[1].payload = bytes([chunks[1].payload[0] ^ 1]) + chunks[1].payload[1:]


def cut_payload(chunks: Chunks) -> None:
    with_payload(chunks[1], chunks[1].payload[:-2])


def add_rows(chunks: Chunks) -> None:
    chunks[2].row_end += 1
    with_payload(chunks[2], chunks[2].payload + bytes(16))


def swap(chunks: Chunks) -> None:
    chunks[0], chunks[1] = chunks[1], chunks[0]


def repeat(chunks: Chunks) -> None:
    chunks.insert(1, chunks[0])


def append(chunks: Chunks) -> None:
    chunks.append(chunks[0])


def answer(chunks: Chunks) -> None:
    chunks[0].answer_token_ids.extend([1, 2])


def set_all(**fields: int) -> Callable[[Chunks], None]:
    def change(chunks: Chunks) -> None:
        for chunk in chunks:
            for name, value in fields.items():
                setattr(chunk, name, value)

    return change


def miscount(chunks: Chunks) -> None:
    chunks[-1].totals.num_chunks += 1


def hang(context: grpc.ServicerContext) -> None:
    ended = threading.Event()
    context.add_callback(ended.set)
    assert ended.wait(WAIT_S), "nobody gave this call up"


def never(chunks: Chunks, context: grpc.ServicerContext) -> Iterator[bytes]:
    hang(context)
    yield from ()


def hang_in_mid_stream(chunks: Chunks, context: grpc.ServicerContext) -> Iterator[bytes]:
    yield chunks[0].SerializeToString()
    hang(context)


def say_garbage(chunks: Chunks, context: grpc.ServicerContext) -> Iterator[bytes]:
    yield b"\xff" * 50


def abort_with(status: grpc.StatusCode) -> Lie:
    def lie(chunks: Chunks, context: grpc.ServicerContext) -> Iterator[bytes]:
        yield chunks[0].SerializeToString()
        context.abort(status, "so it says")

    return lie


class Target:
    """A gRPC server that answers as it is told to."""

    def __init__(self, lie: Lie = honestly, describe: Callable[[grpc.ServicerContext], object] | None = None) -> None:
        self.lie = lie
        self.describe = describe or (lambda context: description())
        self.asked: list[int] = []
        self.num_open = 0
        self.lock = threading.Lock()
        self.server = grpc.server(ThreadPoolExecutor(16))
        handlers = {
            "Describe": grpc.unary_unary_rpc_method_handler(
                lambda message, context: self.describe(context),
                response_serializer=wire.DescribeResponse.SerializeToString,
            ),
            "Capture": grpc.unary_stream_rpc_method_handler(
                self.capture, request_deserializer=wire.CaptureRequest.FromString
            ),
        }
        self.server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        self.address = f"127.0.0.1:{self.server.add_insecure_port('127.0.0.1:0')}"
        self.server.start()

    def capture(self, request: wire.CaptureRequest, context: grpc.ServicerContext) -> Iterator[bytes]:
        with self.lock:
            self.asked.append(request.sample_id)
            self.num_open += 1
        context.add_callback(self.close_one)
        yield from self.lie(honest_chunks(request), context)

    def close_one(self) -> None:
        with self.lock:
            self.num_open -= 1


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedRedis]:
    with EmbeddedRedis.start(tmp_path_factory.mktemp("redis"), 10_000_000) as running:
        yield running


@pytest.fixture
def client(embedded: EmbeddedRedis) -> Iterator[Client]:
    client = connect(embedded.url)
    yield client
    client.flushdb()


@pytest.fixture
def start_target() -> Iterator[Callable[..., Target]]:
    started: list[Target] = []

    def start(*args: object, **options: object) -> Target:
        started.append(Target(*args, **options))  # type: ignore[arg-type]
        return started[-1]

    yield start
    for target in started:
        target.server.stop(0).wait()


class PatientClient(TargetClient):
    """Whatever the shard's patience."""

    def capture(self, job: CaptureJob, **options: Any) -> Iterator[tuple[Chunk, memoryview]]:
        return super().capture(job, **(options | {"first_chunk_s": WAIT_S, "progress_s": WAIT_S}))


class Run:
    """A shard at work on eight captures, with the driver's and the trainer's part played by the test."""

    def __init__(self, embedded: EmbeddedRedis, client: Client, *, silent: Target | None = None) -> None:
        self.client = client
        self.table, self.work = RedisTable(client, PREFIX), WorkQueue(client, PREFIX)
        self.registry = TargetRegistry(client, PREFIX)
        self.telemetry = TelemetryReader(client, PREFIX)
        self.reader = ReplayReader(embedded.url, PREFIX, SIGNATURE)
        num_bytes = SIGNATURE.reserved_bytes(make_job(0))
        config = ReplayConfig.model_validate(
            {
                "capacity": 4 * num_bytes,
                "chunk": 32 + shard_module.STORED_VALUE_OVERHEAD_BYTES,
                "pulls": PULLS,
                "lease_s": 5 * WAIT_S,
                "first_chunk_s": PATIENCE_S if silent and silent.lie is never else WAIT_S,
                "progress_s": PATIENCE_S if silent and silent.lie is hang_in_mid_stream else WAIT_S,
            }
        )

        def connect_target(address: str) -> TargetClient:
            return TargetClient(address) if silent and address == silent.address else PatientClient(address)

        self.shard = ReplayShard(embedded.url, PREFIX, config, SIGNATURE, connect_target=connect_target)
        for capture in range(NUM_CAPTURES):
            self.work.push(make_job(capture))
        self.trained: list[int] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        thread = threading.Thread(target=self.shard.run)
        thread.start()
        try:
            yield
        finally:
            self.shard.stop()
            thread.join(WAIT_S)
        assert not thread.is_alive(), "the shard did not stop"

    def publish(self, *targets: Target) -> dict[str, str]:
        return self.registry.publish([target.address for target in targets], time.time() + 1000)

    def wait_for_verdict(self, *targets: Target) -> str:
        """Why the first target is quarantined."""
        found: dict[str, str] = {}
        wait_until(lambda: bool(found.update(self.publish(*targets)) or found), "a verdict")
        assert set(found) == {targets[0].address}
        return found[targets[0].address]

    def train(self, count: int) -> None:
        """Use so many samples up, each held against what an honest target gives."""
        for _ in range(count):
            (lease,) = self.lease()
            capture = lease.sample.job.capture
            sample = self.reader.fetch(lease)
            assert torch.equal(sample.context, features(capture)[0])
            assert torch.equal(sample.last, features(capture)[1])
            self.reader.ack([lease], 0)
            self.trained.append(capture)

    def lease(self) -> list[SampleLease]:
        return self.reader.lease(rank=0, generation=0, count=1, lease_s=5 * WAIT_S, timeout_s=WAIT_S)

    def events(self) -> str:
        return "\n".join(record["message"] for record in self.telemetry.read())

    def check_nothing_leaked(self) -> None:
        wait_until(lambda: self.shard.stats().num_in_flight == 0, "the end of the pulls")
        info = self.table.info()
        assert (info.resident_bytes, info.num_inserting, info.num_ready) == (0, 0, 0)
        assert info.peak_bytes <= info.capacity_bytes
        assert audit_table(self.client, PREFIX) == []


LIES: dict[str, tuple[Lie, str]] = {
    "NaN": (changing(lambda chunks: spoil(chunks[1], 0x7FC0)), "gave NaN or infinity 3 times: context: 1 of rows 2 to"),
    "negative infinity": (changing(lambda chunks: spoil(chunks[-1], 0xFF80)), "gave NaN or infinity 3 times: last: 1"),
    "flipped bit": (changing(flip_bit), "broke the protocol 2 times: rows 2 to 4 of context: checksum of 32 bytes is"),
    "other hidden size": (changing(halve_width), "came in 16 bytes, the replay table holds rows of 16 bytes"),
    "payload cut short": (changing(cut_payload), "rows 2 to 4 of context are 32 bytes, but 30 came"),
    "too many rows": (changing(add_rows), "rows 4 to 7 of context came after row 4 of 6"),
    "rows missing": (changing(lambda chunks: chunks.pop(1)), "rows 4 to 6 of context came after row 2 of 6"),
    "end missing": (changing(lambda chunks: chunks.pop()), "the stream ended after 3 chunks without the final one"),
    "chunks out of order": (changing(swap), "rows 2 to 4 of context came after row 0 of 6"),
    "chunk twice": (changing(repeat), "rows 0 to 2 of context came after row 2 of 6"),
    "chunk after the end": (changing(append), "a chunk came after the final one"),
    "wrong totals": (changing(miscount), "came, (5, 6, 2, 112) said"),
    "other dtype": (changing(set_all(dtype=DTYPE_TO_WIRE["fp16"])), "dtype number 2 came, bf16 was asked for"),
    "other sample": (changing(set_all(sample_id=99)), "a chunk of sample 99"),
    "older attempt": (changing(set_all(generation=77)), "try 77, came"),
    "unknown tensor": (changing(set_all(tensor=9)), "tensor number 9 is unknown"),
    "answer to no question": (changing(answer), "an answer of 2 tokens came, none was asked for"),
    "no message at all": (say_garbage, "no FeatureChunk"),
    "message too large": (
        changing(lambda chunks: with_payload(chunks[0], bytes(5 * 1024**2))),
        "): a chunk has at most 4194304 bytes",
    ),
    "never answers": (never, "gave nothing for too long 2 times: target 127.0.0.1:"),
    "hangs in mid-stream": (hang_in_mid_stream, f"nothing came for {PATIENCE_S} s after 1 chunks"),
    "fails": (abort_with(grpc.StatusCode.INTERNAL), "failed to compute 3 times: target 127.0.0.1:"),
    "is another service": (abort_with(grpc.StatusCode.UNIMPLEMENTED), "so it says (UNIMPLEMENTED)"),
    "breaks off": (abort_with(grpc.StatusCode.UNAVAILABLE), "broke off 6 times: target 127.0.0.1:"),
    "says that features are not finite": (abort_with(grpc.StatusCode.DATA_LOSS), "gave NaN or infinity 3 times"),
}


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets_module, "LONGEST_PAUSE_S", 0.1)
    monkeypatch.setattr(targets_module, "FIRST_PAUSE_S", 0.1)
    monkeypatch.setattr(shard_module, "SHUN_S", 0.2)
    monkeypatch.setattr(targets_module, "DESCRIBE_TIMEOUT_S", WAIT_S)


@pytest.mark.parametrize("name", LIES)
def test_only_target_answers_wrongly(
    name: str, embedded: EmbeddedRedis, client: Client, start_target: Callable[..., Target]
) -> None:
    lie, says = LIES[name]
    wrong, well = start_target(lie), start_target()
    run = Run(embedded, client, silent=wrong)
    run.publish(wrong)
    with run.running():
        reason = run.wait_for_verdict(wrong)
        assert says in reason
        wait_until(lambda: "goes to another try" in run.events(), "an event")
        run.publish()
        run.publish(well)
        run.train(NUM_CAPTURES)
        run.check_nothing_leaked()
    assert sorted(run.trained) == list(range(NUM_CAPTURES))
    outcomes = run.table.drain_outcomes()
    assert [outcome.kind for outcome in outcomes] == ["committed"] * NUM_CAPTURES
    wait_until(lambda: wrong.num_open == 0, "the end of every call")


def never_describe(context: grpc.ServicerContext) -> wire.DescribeResponse:
    hang(context)
    return description()


@pytest.mark.parametrize(
    ("describe", "says"),
    [
        (lambda context: description(fingerprint="stale"), "has fingerprint stale and hidden size 4"),
        (lambda context: description(hidden_size=8), "hidden size 8"),
        (lambda context: description(num_layers=2), "has 2 layers, the replay table wants [2]"),
        (lambda context: description(wire_version=9), "speaks wire version 9, this is 2"),
        (never_describe, "gave nothing for too long 2 times"),
        (lambda context: context.abort(grpc.StatusCode.UNAUTHENTICATED, "no token"), "does not let us in"),
    ],
    ids=["fingerprint", "hidden size", "layers", "wire version", "silence", "no entry"],
)
def test_only_target_is_no_target_of_this_run(
    describe: Callable[[grpc.ServicerContext], object],
    says: str,
    embedded: EmbeddedRedis,
    client: Client,
    start_target: Callable[..., Target],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if describe is never_describe:
        monkeypatch.setattr(targets_module, "DESCRIBE_TIMEOUT_S", PATIENCE_S)
    wrong, well = start_target(describe=describe), start_target()
    run = Run(embedded, client)
    run.publish(wrong)
    with run.running():
        assert says in run.wait_for_verdict(wrong)
        assert wrong.asked == [], "refused before the first insert"
        monkeypatch.setattr(targets_module, "DESCRIBE_TIMEOUT_S", WAIT_S)
        run.publish(well)
        run.train(NUM_CAPTURES)
        run.check_nothing_leaked()
    assert sorted(run.trained) == list(range(NUM_CAPTURES))


@pytest.mark.parametrize("name", ["NaN", "flipped bit", "never answers", "rows missing"])
def test_wrong_target_beside_one_that_is_well_costs_nothing_but_time(
    name: str, embedded: EmbeddedRedis, client: Client, start_target: Callable[..., Target]
) -> None:
    lie, says = LIES[name]
    wrong, well = start_pair(start_target)
    wrong.lie, well.lie = lie, slowly
    run = Run(embedded, client, silent=wrong)
    for capture in range(NUM_CAPTURES, 4 * NUM_CAPTURES):
        run.work.push(make_job(capture))
    run.publish(wrong, well)
    with run.running():
        trainer = threading.Thread(target=run.train, args=(4 * NUM_CAPTURES,))
        trainer.start()
        assert says.partition(":")[0] in run.wait_for_verdict(wrong, well)
        trainer.join(WAIT_S)
        run.check_nothing_leaked()
    assert sorted(run.trained) == list(range(4 * NUM_CAPTURES))
    assert {outcome.kind for outcome in run.table.drain_outcomes()} == {"committed"}


def start_pair(start_target: Callable[..., Target]) -> tuple[Target, Target]:
    """Two targets; where both are idle the shard asks the first one."""
    first, second = sorted((start_target(), start_target()), key=lambda target: target.address)
    return first, second


def slowly(chunks: Chunks, context: grpc.ServicerContext) -> Iterator[bytes]:
    """So that a second target gets its share."""
    time.sleep(0.05)
    return tell(chunks)


def nan_for(*captures: int, status: grpc.StatusCode | None = None) -> Lie:
    """NaN for these captures, on every target; the others are well."""

    def lie(chunks: Chunks, context: grpc.ServicerContext) -> Iterator[bytes]:
        if chunks[0].sample_id in captures:
            if status is not None:
                context.abort(status, "so it says")
            spoil(chunks[0], 0x7FC0)
        return slowly(chunks, context)

    return lie


@pytest.mark.parametrize("num_targets", [1, 2])
def test_prompt_that_gives_nan_everywhere_is_skipped_and_no_target_is_blamed(
    num_targets: int, embedded: EmbeddedRedis, client: Client, start_target: Callable[..., Target]
) -> None:
    asked_again, others_done = threading.Event(), threading.Event()
    num_asked = itertools.count(1)

    def nan_again_when_others_were_well(chunks: Chunks, context: grpc.ServicerContext) -> Iterator[bytes]:
        if chunks[0].sample_id == 3 and next(num_asked) == 2:
            asked_again.set()
            assert others_done.wait(WAIT_S)
        if chunks[0].sample_id == NUM_CAPTURES - 1:
            assert asked_again.wait(WAIT_S)
        return nan_for(3)(chunks, context)

    targets = [start_target(nan_again_when_others_were_well) for _ in range(num_targets)]
    run = Run(embedded, client)
    run.publish(*targets)
    with run.running():
        run.train(NUM_CAPTURES - 1)
        wait_until(lambda: run.shard.stats().num_in_flight == 1, "the end of the other captures")
        others_done.set()
        run.check_nothing_leaked()
    assert sorted(run.trained) == [0, 1, 2, 4, 5, 6, 7]
    assert run.publish(*targets) == {}
    (skipped,) = [outcome for outcome in run.table.drain_outcomes() if outcome.kind == "failed"]
    assert (skipped.capture, skipped.retry) == (3, False)
    where = "on 2 different targets" if num_targets == 2 else "2 times on a target that serves others"
    assert "1 of rows 0 to 2 hold NaN or infinity as bf16, first row 0" in skipped.reason
    assert f"({where})" in skipped.reason


def test_prompt_that_gives_nan_again_after_the_only_target_restarted_is_skipped(
    embedded: EmbeddedRedis, client: Client, start_target: Callable[..., Target]
) -> None:
    first, restarted = start_target(nan_for(0)), start_target(nan_for(0))
    run = Run(embedded, client)
    for capture in range(1, NUM_CAPTURES):
        run.work.done(make_job(capture))
    run.publish(first)
    with run.running():
        assert "gave NaN or infinity 3 times" in run.wait_for_verdict(first)
        run.publish()
        run.publish(restarted)
        wait_until(lambda: run.shard.stats().num_failed == 1, "the end of the capture")
        run.check_nothing_leaked()
    (skipped,) = run.table.drain_outcomes()
    assert (skipped.kind, skipped.retry) == ("failed", False)
    assert "(2 times on a target that has restarted)" in skipped.reason
    assert run.publish(restarted) == {}
    assert (first.asked, restarted.asked) == ([0, 0, 0], [0, 0])


def test_target_that_refuses_what_another_one_takes_is_quarantined(
    embedded: EmbeddedRedis, client: Client, start_target: Callable[..., Target]
) -> None:
    wrong, well = start_pair(start_target)
    wrong.lie, well.lie = nan_for(*range(100), status=grpc.StatusCode.INVALID_ARGUMENT), slowly
    run = Run(embedded, client)
    run.publish(wrong, well)
    with run.running():
        run.train(NUM_CAPTURES)
        assert "other targets made captures that it refused" in run.wait_for_verdict(wrong, well)
        run.check_nothing_leaked()
    assert sorted(run.trained) == list(range(NUM_CAPTURES))


def test_full_target_is_neither_blamed_nor_given_up_on(
    embedded: EmbeddedRedis, client: Client, start_target: Callable[..., Target]
) -> None:
    refusals = iter(range(30))

    def full(chunks: Chunks, context: grpc.ServicerContext) -> Iterator[bytes]:
        for _ in refusals:
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "serves enough already")
        return tell(chunks)

    target = start_target(full)
    run = Run(embedded, client)
    run.publish(target)
    with run.running():
        run.train(NUM_CAPTURES)
        run.check_nothing_leaked()
    assert run.publish(target) == {}
    assert [outcome.attempt for outcome in run.table.drain_outcomes()] == [0] * NUM_CAPTURES


class WrongEngine:
    """An engine behind the real server, whose guards stand between it and the wire."""

    def __init__(self, fault: Callable[[CapturedFeatures], CapturedFeatures]) -> None:
        self.fault = fault

    def describe(self) -> TargetDescription:
        return TargetDescription(
            model_name="fake",
            fingerprint="f",
            num_layers=4,
            hidden_size=4,
            vocab_size=1000,
            dtype="bfloat16",
            max_tokens=100,
            engine="fake",
        )

    def check(self) -> None:
        pass

    def capture(self, batch: list[CaptureInputs]) -> list[CapturedFeatures]:
        return [self.fault(CapturedFeatures(*features(inputs.input_ids[0]))) for inputs in batch]


def with_nan(found: CapturedFeatures) -> CapturedFeatures:
    found.context[2, 1] = float("nan")
    return found


def raise_it(found: CapturedFeatures) -> CapturedFeatures:
    raise RuntimeError("out of memory")


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (with_nan, "gave NaN or infinity 3 times: target 127.0.0.1:"),
        (lambda found: found._replace(context=found.context[:-1].contiguous()), "5 of 6 context rows"),
        (lambda found: found._replace(context=found.context.float()), "are 16 bytes, but 32 came"),
        (raise_it, "failed to compute 3 times: target 127.0.0.1:"),
    ],
    ids=["NaN", "a row too few", "other dtype", "error"],
)
def test_engine_behind_our_own_server_answers_wrongly(
    fault: Callable[[CapturedFeatures], CapturedFeatures],
    says: str,
    embedded: EmbeddedRedis,
    client: Client,
    start_target: Callable[..., Target],
) -> None:
    config = TargetConfig(model="fake", num_gpus=0)
    server = serve(WrongEngine(fault), config)
    well = start_target()
    run = Run(embedded, client)
    run.registry.publish([server.address], time.time() + 1000)
    found: dict[str, str] = {}
    try:
        with run.running():
            wait_until(
                lambda: bool(found.update(run.registry.publish([server.address], time.time() + 1000)) or found),
                "a verdict",
            )
            assert says in found[server.address]
            run.publish(well)
            run.train(NUM_CAPTURES)
            run.check_nothing_leaked()
    finally:
        server.stop()
    assert sorted(run.trained) == list(range(NUM_CAPTURES))
