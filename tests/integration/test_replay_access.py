"""Token and TLS of the replay service: who gets in, what others are told; health checking and reflection."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from replay_serving import SIGNATURE, WAIT_S, Serving, assert_equal, insert, serving, take

from services.errors import ReplayAccessError, ReplayError, ReplayUnavailableError, UsageError
from services.grpc_access import call_metadata, open_channel
from services.replay.embedded import EmbeddedRedis
from services.replay.service_client import ReplayClient
from services.replay.wire import SERVICE
from services.security import Credentials

OWN = Credentials.make()


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedRedis]:
    with EmbeddedRedis.start(tmp_path_factory.mktemp("redis"), 1024**2) as running:
        yield running


@pytest.fixture(scope="module")
def protected(embedded: EmbeddedRedis) -> Iterator[Serving]:
    with serving(embedded, credentials=OWN) as running:
        yield running


def refusals(served: Serving, credentials: Credentials | None) -> set[str]:
    """What each kind of call is told."""
    told = set()
    with ReplayClient(served.address, credentials) as client, client.producer(SIGNATURE) as producer:
        calls = (
            client.info,
            lambda: client.ack([]),
            lambda: client.update_priorities({}),
            lambda: take(client, wait_s=0),
            lambda: insert(producer, 1),
        )
        for call in calls:
            with pytest.raises(ReplayAccessError) as refused:
                call()
            told.add(str(refused.value))
    return told


@pytest.mark.parametrize(
    ("credentials", "says"),
    [
        (replace(OWN, token="another-token"), "this token is wrong"),
        (replace(OWN, token=None), "this server needs a token"),
        (None, "it speaks TLS, and no certificate was given"),
        (Credentials.make(), "another certificate than the one given here"),
        (replace(OWN, name=None), "does not stand for 127.0.0.1"),
    ],
)
def test_caller_that_does_not_fit_is_told_why(protected: Serving, credentials: Credentials | None, says: str) -> None:
    (told,) = refusals(protected, credentials)
    assert says in told
    assert str(OWN.token) not in told
    protected.assert_at_rest()


def test_caller_with_token_and_certificate_gets_in(protected: Serving) -> None:
    with ReplayClient(protected.address, OWN.for_client()) as client:
        with client.producer(SIGNATURE) as producer:
            insert(producer, 1)
        (sample,) = take(client)
        assert_equal(sample)
        client.ack([sample.lease])
    protected.assert_at_rest()


def test_client_with_a_certificate_is_told_that_the_service_speaks_no_tls(embedded: EmbeddedRedis) -> None:
    with serving(embedded) as served:
        (told,) = refusals(served, OWN.for_client())
    assert "it speaks no TLS" in told


def test_service_beyond_loopback_needs_token_and_tls(embedded: EmbeddedRedis) -> None:
    with pytest.raises(UsageError, match="without token and TLS"), serving(embedded, address="0.0.0.0:0"):
        pass


def test_health_and_reflection_are_there_for_those_with_the_token(protected: Serving) -> None:
    with open_channel(protected.address, OWN.for_client(), []) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest(service=SERVICE)
        with pytest.raises(grpc.RpcError) as refused:
            health.Check(request, timeout=WAIT_S)
        assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED
        metadata = call_metadata(OWN)
        assert health.Check(request, timeout=WAIT_S, metadata=metadata).status == health_pb2.HealthCheckResponse.SERVING
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
        asked = reflection_pb2.ServerReflectionRequest(file_containing_symbol=SERVICE)
        (answer,) = reflection.ServerReflectionInfo(iter([asked]), timeout=WAIT_S, metadata=metadata)
        assert len(answer.file_descriptor_response.file_descriptor_proto) > 0


def test_dead_service_and_closed_client_are_unavailable(embedded: EmbeddedRedis) -> None:
    with serving(embedded) as served:
        client = ReplayClient(served.address)
        client.info()
    for _ in range(2):
        with client.producer(SIGNATURE) as producer:
            for call in (client.info, lambda: take(client, wait_s=0), lambda: insert(producer, 1)):
                with pytest.raises(ReplayUnavailableError, match=served.address):
                    call()
        client.close()


def test_other_service_than_replay_is_named(embedded: EmbeddedRedis) -> None:
    with serving(embedded) as served, grpc.insecure_channel(served.address) as channel:
        with pytest.raises(grpc.RpcError) as refused:
            channel.unary_unary("/slipstream.target.v1.Target/Describe")(b"", timeout=WAIT_S)
        assert refused.value.code() == grpc.StatusCode.UNIMPLEMENTED
    assert issubclass(ReplayAccessError, ReplayError)
