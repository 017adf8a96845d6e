"""The replay service against messages that nobody should send: each ends in a clear status, nothing leaks or sticks."""

from __future__ import annotations

import contextlib
import random
import socket
from collections.abc import Iterator

import grpc
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from replay_serving import SAMPLE_BYTES, SIGNATURE, Serving, assert_equal, insert, serving, take
from waiting import wait_until

from services.checksum import crc32c
from services.contracts import LeaseName
from services.errors import ReplayRequestError
from services.grpc_errors import ERROR_NAME
from services.replay.embedded import EmbeddedRedis
from services.replay.service_client import ReplayClient
from services.replay.service_config import ServiceConfig
from services.replay.wire import MAX_MESSAGE_BYTES, SERVICE, WIRE_VERSION, write_signature
from services.wire import replay_pb2 as wire
from services.wire import target_pb2 as target_wire

EXAMPLES = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
CALL_S = 120.0
ONE_AT_A_TIME = ServiceConfig(max_inserts=1, max_leases=1, progress_s=CALL_S, max_wait_s=0.05)
"""A single place that is not given back shows at the next call."""

CLEAR = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.DATA_LOSS,
    grpc.StatusCode.DEADLINE_EXCEEDED,
}
"""And RESOURCE_EXHAUSTED, but only of a sample that is too large."""

UINT32, UINT64 = 2**32 - 1, 2**64 - 1
IDS = st.one_of(st.integers(0, 3), st.integers(0, UINT64))
NUMBERS = st.one_of(st.integers(0, 4), st.integers(0, UINT32))
SECONDS = st.one_of(st.sampled_from([0.0, 0.01, 1.0]), st.floats())
SHORT = st.one_of(st.sampled_from([0.0, 0.01, 1.0]), st.floats())
NAMES = st.one_of(st.sampled_from(["", "f00d"]), st.text(max_size=120))
ROW = bytes(range(32))

signatures = st.one_of(
    st.just(write_signature(SIGNATURE)),
    st.builds(
        wire.Signature,
        fingerprint=NAMES,
        layer_ids=st.lists(st.integers(-2, 4), max_size=3),
        hidden_size=NUMBERS,
        dtype=st.integers(0, 5),
    ),
)
opens = st.builds(
    wire.Open, wire_version=st.sampled_from([WIRE_VERSION] * 9 + [0]), signature=signatures, producer=NAMES
)
begins = st.one_of(
    st.builds(
        wire.Begin,
        sample_id=st.integers(0, 3),
        token_ids=st.just([1]),
        loss_mask=st.just([1]),
        last_rows=st.just([]),
        max_wait_s=st.just(0.01),
    ),
    st.builds(
        wire.Begin,
        sample_id=IDS,
        token_ids=st.lists(NUMBERS, max_size=4),
        loss_mask=st.lists(st.integers(0, 2), max_size=4),
        last_rows=st.lists(NUMBERS, max_size=3),
        num_uses=NUMBERS,
        prompt=st.one_of(st.none(), IDS),
        epoch=NUMBERS,
        max_wait_s=SHORT,
    ),
)
chunks = st.one_of(
    st.builds(
        target_wire.FeatureChunk,
        sample_id=st.integers(0, 3),
        tensor=st.just(1),
        row_end=st.just(1),
        row_width=st.just(16),
        dtype=st.just(1),
        crc32c=st.just(crc32c(ROW)),
        payload=st.just(ROW),
    ),
    st.builds(
        target_wire.FeatureChunk,
        sample_id=IDS,
        tensor=st.integers(0, 3),
        row_start=NUMBERS,
        row_end=NUMBERS,
        row_width=st.one_of(st.sampled_from([8, 16]), NUMBERS),
        dtype=st.integers(0, 5),
        crc32c=st.integers(0, UINT32),
        payload=st.binary(max_size=100),
    ),
)
steps = st.one_of(
    st.builds(wire.InsertRequest, open=opens),
    st.builds(wire.InsertRequest, begin=begins),
    st.builds(wire.InsertRequest, chunk=chunks),
    st.builds(wire.InsertRequest, commit=st.builds(wire.Commit, sample_id=st.integers(0, 3))),
    st.just(wire.InsertRequest()),
).map(lambda step: step.SerializeToString())
OPENED = wire.InsertRequest(
    open=wire.Open(wire_version=WIRE_VERSION, signature=write_signature(SIGNATURE))
).SerializeToString()
BEGUN = wire.InsertRequest(
    begin=wire.Begin(sample_id=2, token_ids=[1, 2], loss_mask=[0, 1], last_rows=[0], max_wait_s=0.01)
).SerializeToString()

unary = st.one_of(
    st.tuples(st.just("Info"), st.builds(wire.InfoRequest)),
    st.tuples(
        st.just("Lease"),
        st.builds(
            wire.LeaseRequest,
            rank=NUMBERS,
            generation=IDS,
            count=NUMBERS,
            lease_s=SECONDS,
            max_wait_s=SHORT,
            sample_ids=st.lists(IDS, max_size=3),
            with_chunks=st.booleans(),
        ),
    ),
    st.tuples(
        st.sampled_from(["Ack", "Release"]),
        st.builds(wire.AckRequest, generation=IDS, lease_ids=st.lists(NAMES, max_size=3)),
    ),
    st.tuples(
        st.just("UpdatePriorities"),
        st.builds(
            wire.UpdatePrioritiesRequest,
            rejections=st.lists(st.builds(wire.Rejection, sample_id=IDS, rejection=st.floats()), max_size=3),
        ),
    ),
).map(lambda pair: (pair[0], pair[1].SerializeToString()))


class Asking:
    """Sends bytes as they are, and looks whether the service is well afterwards."""

    def __init__(self, served: Serving, channel: grpc.Channel) -> None:
        self.served = served
        self._channel = channel

    def insert(self, messages: list[bytes]) -> None:
        call = self._channel.stream_stream(f"/{SERVICE}/Insert")(iter(messages), timeout=CALL_S)
        self._ends_clearly(call)

    def call(self, method: str, message: bytes) -> None:
        self._ends_clearly(self._channel.unary_stream(f"/{SERVICE}/{method}")(message, timeout=CALL_S))

    def _ends_clearly(self, call: grpc.Call) -> None:
        refusal = None
        try:
            list(call)
        except grpc.RpcError as error:
            refusal = error
        if refusal is not None:
            name = dict(refusal.trailing_metadata()).get(ERROR_NAME)
            is_clear = refusal.code() in CLEAR or name == "SampleTooLargeError"
            assert is_clear, f"{refusal.code()}: {refusal.details()}"
            assert name, refusal.details()
            assert len(refusal.details()) > 20
        # The place and the sample are given back right before or right after the caller hears of the end.
        table = self.served.table
        wait_until(lambda: table.info().num_inserting == 0, "the end of the sample")
        wait_until(lambda: self._free() == (1, 1), "the end of the call")
        assert self.served.problems() == []
        assert self.served.redis.hlen(f"{self.served.prefix}:work:jobs") == 0

    def _free(self) -> tuple[int, int]:
        service = self.served.service._service
        return service._inserts._free._value, service._leases._free._value


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    with (
        EmbeddedRedis.start(tmp_path_factory.mktemp("redis"), 1024**2) as embedded,
        serving(embedded, config=ONE_AT_A_TIME, reuse=2) as running,
    ):
        yield running


@pytest.fixture(scope="module")
def ask(served: Serving) -> Iterator[Asking]:
    with grpc.insecure_channel(served.address) as channel:
        yield Asking(served, channel)


@EXAMPLES
@given(messages=st.lists(st.binary(max_size=100), max_size=3), is_open=st.booleans())
@example(messages=[], is_open=False)
@example(messages=[b""], is_open=True)
@example(messages=[BEGUN, b"\x1a\xff"], is_open=True)
@example(messages=[BEGUN, b"\x1a\x02\xa2\x06"], is_open=True)
def test_bytes_that_are_no_insert_are_refused(ask: Asking, messages: list[bytes], is_open: bool) -> None:
    ask.insert([OPENED, *messages] if is_open else messages)


@settings(EXAMPLES, max_examples=250)
@given(messages=st.lists(steps, max_size=5), start=st.sampled_from([[], [OPENED], [OPENED, BEGUN]]))
def test_insert_of_wrong_values_is_refused_or_taken(ask: Asking, messages: list[bytes], start: list[bytes]) -> None:
    ask.insert([*start, *messages])


@settings(EXAMPLES, max_examples=150)
@given(call=unary)
def test_call_of_wrong_values_is_refused_or_answered(ask: Asking, call: tuple[str, bytes]) -> None:
    ask.call(*call)


@EXAMPLES
@given(method=st.sampled_from(["Info", "Lease", "Ack", "Release", "UpdatePriorities"]), message=st.binary(max_size=200))
def test_bytes_that_are_no_request_are_refused(ask: Asking, method: str, message: bytes) -> None:
    ask.call(method, message)


def test_message_over_the_bound_is_refused(ask: Asking, served: Serving) -> None:
    with ReplayClient(served.address) as client:
        with pytest.raises(ReplayRequestError, match=r"larger than max.*send less in one call"):
            client.ack([LeaseName(lease_id="x" * MAX_MESSAGE_BYTES)])
        assert client.info().table == served.table.info()


def test_bytes_that_are_no_grpc_do_no_harm(served: Serving, ask: Asking) -> None:
    rng = random.Random(0)
    host, _, port = served.address.rpartition(":")
    for size in (1, 24, 1000, 100_000):
        with socket.create_connection((host, int(port)), CALL_S) as connection, contextlib.suppress(ConnectionError):
            connection.sendall(rng.randbytes(size))
    ask.call("Info", b"")


def test_service_is_well_after_all_of_it(served: Serving) -> None:
    """Runs last: what the messages above left is used up, then a whole sample goes through."""
    with ReplayClient(served.address) as client:
        served.table.expire(1e18)
        while samples := take(client, wait_s=0):
            client.ack([sample.lease for sample in samples])
        served.assert_at_rest()
        with client.producer(SIGNATURE) as producer:
            assert insert(producer, 77)
        assert served.table.info().resident_bytes == SAMPLE_BYTES
        for _ in range(2):
            (sample,) = take(client)
            assert_equal(sample)
            client.ack([sample.lease])
    served.assert_at_rest()
