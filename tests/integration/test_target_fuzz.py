"""A target and its client against messages that nobody should send: each ends in a clear error, none holds a place."""

from __future__ import annotations

import contextlib
import random
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from synthetic_target import WAIT_S, SyntheticEngine, a_job, capture_rows
from transformers import Qwen3Config, Qwen3ForCausalLM
from waiting import wait_until

from services.contracts import WIRE_VERSION
from services.errors import CaptureRequestError, TargetUnavailableError, WireError
from services.target import server as server_module
from services.target.client import TargetClient
from services.target.config import TargetConfig
from services.target.engine import TransformersEngine
from services.target.request import SERVICE
from services.target.server import RunningServer, serve
from services.wire import target_pb2 as wire

VOCAB, LAYERS, MAX_TOKENS = 50, 4, 128
ONE_AT_A_TIME = TargetConfig(
    model="tiny", dtype="float32", num_gpus=0, threads=1, max_batch_tokens=MAX_TOKENS, max_concurrent_captures=1
)
"""A single place that is not given back shows at the next capture."""

EXAMPLES = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
CLEAR = {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.DATA_LOSS}

UINT32 = 2**32 - 1
NUMBERS = st.one_of(st.integers(0, 5), st.integers(0, UINT32))
TOKENS = st.lists(st.one_of(st.integers(0, VOCAB - 1), NUMBERS), max_size=12)
DTYPES = st.integers(0, 5)
CHUNKS = st.one_of(st.sampled_from([0, 1, 400, 4 * 1024**2, UINT32]), NUMBERS)

generations = st.builds(
    wire.Generate,
    max_new_tokens=st.one_of(st.integers(0, 6), NUMBERS),
    temperature=st.floats(width=32),
    seed=st.integers(0, 2**64 - 1),
    stop_token_ids=TOKENS,
    last_rows=st.integers(0, 4),
)
requests = st.builds(
    wire.CaptureRequest,
    wire_version=st.sampled_from([WIRE_VERSION] * 9 + [0]),
    sample_id=st.integers(0, 2**64 - 1),
    generation=NUMBERS,
    token_ids=st.one_of(TOKENS, st.just([1] * MAX_TOKENS), st.just([1] * (MAX_TOKENS + 1))),
    layer_ids=st.lists(st.one_of(st.integers(-2, LAYERS), st.integers(-(2**31), 2**31 - 1)), max_size=4),
    last_rows=st.one_of(st.just([]), st.lists(NUMBERS, max_size=6), st.lists(NUMBERS, max_size=6).map(sorted)),
    dtype=DTYPES,
    chunk_bytes=CHUNKS,
    generate=st.one_of(st.none(), generations),
)
valid = wire.CaptureRequest(
    wire_version=WIRE_VERSION, token_ids=[1, 2, 3], layer_ids=[0], last_rows=[1], dtype=wire.FP32
).SerializeToString()


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=MAX_TOKENS,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    config_of_target = ONE_AT_A_TIME.model_copy(update={"model": str(folder)})
    running = serve(TransformersEngine(config_of_target), config_of_target)
    yield running
    running.stop()


@pytest.fixture(scope="module")
def ask(target: RunningServer) -> Iterator[Callable[[str, bytes], list[bytes]]]:
    """Send bytes to a method, as they are."""
    with grpc.insecure_channel(target.address) as channel:
        yield lambda method, message: list(channel.unary_stream(f"/{SERVICE}/{method}")(message, timeout=WAIT_S))


def answered_clearly(ask: Callable[[str, bytes], list[bytes]], message: bytes) -> None:
    """A whole stream comes, or a refusal in words; nothing else."""
    refusal = None
    try:
        chunks = [wire.FeatureChunk.FromString(chunk) for chunk in ask("Capture", message)]
    except grpc.RpcError as error:
        refusal = error
    if refusal is not None:
        assert refusal.code() in CLEAR, f"{refusal.code()}: {refusal.details()}"
        assert len(refusal.details()) > 20
        return
    assert [chunk.HasField("totals") for chunk in chunks] == [False] * (len(chunks) - 1) + [True]


@EXAMPLES
@given(message=st.binary(max_size=300))
@example(message=b"")
@example(message=b"\xff" * 100)
def test_bytes_that_are_no_request_are_refused(ask: Callable[[str, bytes], list[bytes]], message: bytes) -> None:
    answered_clearly(ask, message)


@EXAMPLES
@given(place=st.integers(0, len(valid) - 1), byte=st.integers(0, 255), cut=st.integers(0, len(valid)))
def test_request_with_a_wrong_byte_is_refused_or_answered(
    ask: Callable[[str, bytes], list[bytes]], place: int, byte: int, cut: int
) -> None:
    answered_clearly(ask, valid[:place] + bytes([byte]) + valid[place + 1 :])
    answered_clearly(ask, valid[:cut])


@settings(EXAMPLES, max_examples=200)
@given(request=requests)
def test_request_of_wrong_values_is_refused_or_answered(
    ask: Callable[[str, bytes], list[bytes]], request: wire.CaptureRequest
) -> None:
    answered_clearly(ask, request.SerializeToString())


def test_target_describes_itself_whatever_the_message(ask: Callable[[str, bytes], list[bytes]]) -> None:
    (answer,) = ask("Describe", b"\xff\xff")
    assert wire.DescribeResponse.FromString(answer).num_layers == LAYERS


def test_bytes_that_are_no_grpc_do_no_harm(target: RunningServer, ask: Callable[[str, bytes], list[bytes]]) -> None:
    rng = random.Random(0)
    host, _, port = target.address.rpartition(":")
    for size in (1, 24, 1000, 100_000):
        with socket.create_connection((host, int(port)), WAIT_S) as connection, contextlib.suppress(ConnectionError):
            connection.sendall(rng.randbytes(size))
    assert len(ask("Capture", valid)) == 2


def test_message_over_the_bound_is_refused_for_good(target: RunningServer) -> None:
    too_long = a_job(5).model_copy(update={"input_ids": (VOCAB - 1,) * 2_000_000})
    with TargetClient(target.address) as client:
        with pytest.raises(CaptureRequestError, match=r"larger than max.*the target takes shorter prompts"):
            capture_rows(client, too_long)
        assert capture_rows(client, a_job())["last"] == 1


def test_caller_who_reads_no_more_loses_his_place(monkeypatch: pytest.MonkeyPatch) -> None:
    was_looked_at = threading.Event()

    class HeldTimer(threading.Timer):
        """Begins when the place has been seen to be taken."""

        def run(self) -> None:
            assert was_looked_at.wait(WAIT_S)
            super().run()

    monkeypatch.setattr(threading, "Timer", HeldTimer)
    monkeypatch.setattr(server_module, "LONGEST_CALL_S", 0.5)
    running = serve(SyntheticEngine(width=32 * 1024), ONE_AT_A_TIME)
    request = wire.CaptureRequest(
        wire_version=WIRE_VERSION, token_ids=[1] * 256, layer_ids=[0, 1, 2], dtype=wire.FP32
    ).SerializeToString()
    with grpc.insecure_channel(running.address) as channel, TargetClient(running.address) as client:
        call = channel.unary_stream(f"/{SERVICE}/Capture")(request)
        next(call)

        def has_place() -> bool:
            with contextlib.suppress(TargetUnavailableError):
                return capture_rows_of(client)
            return False

        assert not has_place(), "the 100 MB that nobody reads hold the only place"
        was_looked_at.set()
        wait_until(has_place, "the end of the call whose caller reads no more")
        with pytest.raises(grpc.RpcError) as cut_off:
            list(call)
        assert cut_off.value.code() == grpc.StatusCode.CANCELLED
    running.stop()


def capture_rows_of(client: TargetClient) -> bool:
    stream = client.capture(a_job(), layer_ids=(0,), wire_dtype="fp32", chunk_bytes=1024**2, timeout_s=WAIT_S)
    return sum(1 for _ in stream) > 0


class Liar:
    """A server that answers Capture with whatever bytes it was told to."""

    def __init__(self) -> None:
        self.messages: list[bytes] = []
        self._server = grpc.server(ThreadPoolExecutor(2))
        handlers = {"Capture": grpc.unary_stream_rpc_method_handler(lambda _, context: iter(self.messages))}
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def stop(self) -> None:
        self._server.stop(0).wait()


@pytest.fixture(scope="module")
def liar() -> Iterator[Liar]:
    running = Liar()
    yield running
    running.stop()


chunks = st.builds(
    wire.FeatureChunk,
    sample_id=st.integers(0, 2),
    generation=st.integers(0, 1),
    tensor=st.integers(0, 3),
    row_start=st.integers(0, 6),
    row_end=st.one_of(st.integers(0, 6), NUMBERS),
    row_width=st.one_of(st.just(16), NUMBERS),
    dtype=st.integers(0, 4),
    totals=st.one_of(st.none(), st.builds(wire.Totals, num_chunks=NUMBERS, context_rows=NUMBERS)),
    answer_token_ids=st.lists(NUMBERS, max_size=2),
    payload=st.binary(max_size=200),
).map(lambda chunk: chunk.SerializeToString())


@EXAMPLES
@given(messages=st.lists(st.one_of(chunks, st.binary(max_size=100)), max_size=3))
def test_client_takes_nothing_but_what_it_asked_for(liar: Liar, messages: list[bytes]) -> None:
    liar.messages = messages
    with TargetClient(liar.address) as client, pytest.raises(WireError):
        capture_rows(client, a_job())
