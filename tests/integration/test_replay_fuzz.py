"""The replay service against messages that nobody should send: each ends in a clear error and holds nothing."""

from __future__ import annotations

from collections.abc import Iterator

import grpc
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from replay_serving import SIGNATURE, TOKENS, WAIT_S, Serving, assert_equal, insert, serving, take
from waiting import wait_until

from services.contracts import WIRE_VERSION
from services.replay.embedded import EmbeddedRedis
from services.replay.service_client import ReplayClient
from services.replay.service_config import ServiceConfig
from services.replay.wire import write_signature
from services.wire import replay_pb2 as wire

EXAMPLES = settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
CLEAR = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.DATA_LOSS,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
}
SERVICE = wire.DESCRIPTOR.services_by_name["Replay"]
METHODS = [method for method in SERVICE.methods if method.name not in ("Insert", "SubmitPrompts")]

numbers = st.one_of(st.integers(0, 7), st.sampled_from([2**31 - 1, 2**32 - 1]))
begins = st.builds(
    wire.Begin,
    sample_id=st.one_of(st.integers(0, 3), st.integers(0, 2**64 - 1)),
    token_ids=st.lists(numbers, max_size=8),
    loss_mask=st.lists(numbers, max_size=8),
    last_rows=st.lists(numbers, max_size=4),
)
commits = st.builds(wire.Commit, sample_id=st.integers(0, 3))
OPEN = wire.InsertRequest(
    open=wire.Open(wire_version=WIRE_VERSION, signature=write_signature(SIGNATURE), producer="fuzz")
).SerializeToString()
WHOLE = wire.Begin(
    sample_id=3, token_ids=range(TOKENS), loss_mask=[0] * (TOKENS - 3) + [1] * 3, last_rows=[TOKENS - 3, TOKENS - 2]
)
"""A sample that the service would take: what is wrong comes after it."""
inserts = st.one_of(
    st.just(wire.InsertRequest(begin=WHOLE).SerializeToString()),
    begins.map(lambda begin: wire.InsertRequest(begin=begin).SerializeToString()),
    commits.map(lambda commit: wire.InsertRequest(commit=commit).SerializeToString()),
    st.binary(max_size=60),
)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    with (
        EmbeddedRedis.start(tmp_path_factory.mktemp("redis"), 64 * 1024**2) as embedded,
        serving(embedded, config=ServiceConfig(progress_s=WAIT_S, max_wait_s=0.2)) as running,
    ):
        yield running


@pytest.fixture(scope="module")
def channel(served: Serving) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(served.address) as opened:
        yield opened


def ask(channel: grpc.Channel, method: str, messages: list[bytes]) -> None:
    """Answers come, or a refusal in words; nothing else."""
    try:
        list(channel.stream_stream(f"/{SERVICE.full_name}/{method}")(iter(messages), timeout=WAIT_S))
    except grpc.RpcError as error:
        refusal = error
    else:
        return
    assert refusal.code() in CLEAR, f"{refusal.code()}: {refusal.details()}"
    assert len(refusal.details()) > 10


@EXAMPLES
@given(method=st.sampled_from(METHODS), content=st.binary(max_size=60))
@example(method=METHODS[0], content=b"\xff" * 40)
def test_service_refuses_or_answers_any_message_and_holds_nothing(
    served: Serving, channel: grpc.Channel, method: object, content: bytes
) -> None:
    ask(channel, method.name, [content])  # type: ignore[attr-defined]
    served.assert_at_rest()


@EXAMPLES
@given(messages=st.lists(inserts, max_size=4).flatmap(lambda rest: st.sampled_from([rest, [OPEN, *rest]])))
@example(messages=[b"\xff"])
@example(messages=[OPEN, wire.InsertRequest(begin=WHOLE).SerializeToString(), b"\xff"])
def test_insert_stream_of_wrong_messages_is_refused_and_gives_its_bytes_back(
    served: Serving, channel: grpc.Channel, messages: list[bytes]
) -> None:
    ask(channel, "Insert", messages)
    wait_until(lambda: served.table.info().num_inserting == 0, "the end of what never came")
    served.assert_at_rest()


def test_service_still_takes_and_gives_samples_after_all_that(served: Serving, channel: grpc.Channel) -> None:
    for content in (b"\xff", b"\x00" * 50):
        ask(channel, "Insert", [content])
    with ReplayClient(served.address) as client, client.producer(SIGNATURE, "tests") as producer:
        insert(producer, 1)
        (sample,) = take(client)
        assert_equal(sample)
        client.ack([sample.lease])
        assert sample.lease.sample.job.capture == 1
    served.assert_at_rest()
