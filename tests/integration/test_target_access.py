"""Token and TLS of a target over real gRPC: who gets in, and what those who do not are told."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from dataclasses import replace

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from synthetic_target import CONFIG, WAIT_S, SyntheticEngine, a_job, capture_rows

from services.errors import TargetAccessError, TargetUnavailableError, UsageError
from services.grpc_access import open_channel
from services.security import NAME, Credentials, make_certificate
from services.target.client import TargetClient
from services.target.server import RunningServer, serve
from services.wire import target_pb2 as wire
from services.wire import target_pb2_grpc as wire_grpc

RUN = Credentials.make()
Serve = Callable[..., RunningServer]


@pytest.fixture(scope="module")
def started() -> Iterator[Serve]:
    """Start a target with credentials."""
    running: list[RunningServer] = []

    def start(credentials: Credentials | None, address: str = "127.0.0.1:0") -> RunningServer:
        running.append(serve(SyntheticEngine(), CONFIG, address, credentials))
        return running[-1]

    yield start
    for server in running:
        server.stop()


@pytest.fixture(scope="module")
def protected(started: Serve) -> RunningServer:
    return started(RUN)


def own_address() -> str:
    """An address of this machine that is not on the loopback interface."""
    for addresses in psutil.net_if_addrs().values():
        for address in addresses:
            if address.family is socket.AF_INET and not address.address.startswith("127."):
                return str(address.address)
    pytest.skip("this machine has no network interface but the loopback one")


def refusal(server: RunningServer, credentials: Credentials | None) -> str:
    with TargetClient(server.address, credentials) as client, pytest.raises(TargetAccessError) as refused:
        client.describe(WAIT_S)
    with TargetClient(server.address, credentials) as client, pytest.raises(TargetAccessError) as again:
        capture_rows(client, a_job())
    assert str(again.value) == str(refused.value)
    assert server.address in str(refused.value)
    return str(refused.value)


def test_client_of_the_run_captures_through_tls(protected: RunningServer) -> None:
    with TargetClient(protected.address, RUN.for_client()) as client:
        assert client.describe(WAIT_S).fingerprint == "f00d"
        assert capture_rows(client, a_job()) == {"context": 5, "last": 1}


def test_target_beyond_loopback_serves_its_run(started: Serve) -> None:
    server = started(RUN, f"{own_address()}:0")
    with TargetClient(server.address, RUN.for_client()) as client:
        assert capture_rows(client, a_job()) == {"context": 5, "last": 1}
    assert "speaks TLS" in refusal(server, None)


@pytest.mark.parametrize("credentials", [None, replace(RUN, token=None), replace(RUN, certificate=None, key=None)])
def test_target_beyond_loopback_needs_token_and_tls(started: Serve, credentials: Credentials | None) -> None:
    with pytest.raises(UsageError, match="is not on the loopback interface"):
        started(credentials, f"{own_address()}:0")


def test_insecure_target_beyond_loopback_wants_the_token_still(started: Serve) -> None:
    credentials = Credentials.make(insecure=True).at(own_address())
    server = started(credentials, f"{own_address()}:0")
    with TargetClient(server.address, credentials) as client:
        assert capture_rows(client, a_job()) == {"context": 5, "last": 1}
    assert "needs a token" in refusal(server, None)


def test_token_alone_protects_a_target_on_loopback(started: Serve) -> None:
    local = RUN.at("127.0.0.1")
    server = started(local)
    with TargetClient(server.address, local) as client:
        assert capture_rows(client, a_job()) == {"context": 5, "last": 1}
    assert "needs a token" in refusal(server, None)


@pytest.mark.parametrize(
    ("credentials", "says"),
    [
        (replace(RUN, token="another-token"), "this token is wrong"),
        (replace(RUN, token=None), "this server needs a token"),
        (None, "it speaks TLS, and no certificate was given"),
        (Credentials.make(), "another certificate than the one given here"),
        (replace(RUN, name="elsewhere"), "does not stand for elsewhere"),
        (replace(RUN, name=None), "does not stand for 127.0.0.1"),
    ],
)
def test_caller_that_does_not_fit_is_told_why(
    protected: RunningServer, credentials: Credentials | None, says: str
) -> None:
    message = refusal(protected, credentials)
    assert says in message
    assert str(RUN.token) not in message


def test_expired_certificate_is_named(started: Serve) -> None:
    certificate, key = make_certificate([NAME], valid_days=-0.5)
    expired = Credentials("a-token-of-its-own", certificate, key, NAME)
    assert "not valid at this time" in refusal(started(expired), expired.for_client())


def test_certificate_for_the_address_needs_no_name(started: Serve) -> None:
    certificate, key = make_certificate(["127.0.0.1"])
    own = Credentials("a-token-of-its-own", certificate, key)
    with TargetClient(started(own).address, own.for_client()) as client:
        assert client.describe(WAIT_S).fingerprint == "f00d"


def test_client_with_a_certificate_is_told_that_the_target_speaks_no_tls(started: Serve) -> None:
    assert "it speaks no TLS" in refusal(started(None), RUN.for_client())


def test_dead_target_is_no_question_of_access(started: Serve) -> None:
    server = started(None)
    server.stop()
    for credentials in (None, RUN.for_client()):
        with TargetClient(server.address, credentials) as client, pytest.raises(TargetUnavailableError) as refused:
            client.describe(WAIT_S)
        assert not isinstance(refused.value, TargetAccessError)


def test_every_method_wants_the_token(protected: RunningServer) -> None:
    calls: list[Callable[[grpc.Channel], object]] = [
        lambda channel: wire_grpc.TargetStub(channel).Describe(wire.DescribeRequest(), timeout=WAIT_S),
        lambda channel: list(wire_grpc.TargetStub(channel).Capture(wire.CaptureRequest(), timeout=WAIT_S)),
        lambda channel: health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=WAIT_S),
        lambda channel: list(
            health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=WAIT_S)
        ),
        lambda channel: list(
            reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(
                iter([reflection_pb2.ServerReflectionRequest(list_services="")]), timeout=WAIT_S
            )
        ),
        lambda channel: channel.unary_unary("/no.such.Service/Method")(b"", timeout=WAIT_S),
    ]
    with open_channel(protected.address, replace(RUN, token=None), []) as channel:
        for call in calls:
            with pytest.raises(grpc.RpcError) as refused:
                call(channel)
            assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED


def test_token_opens_health_checking_and_reflection(protected: RunningServer) -> None:
    metadata = (("authorization", f"Bearer {RUN.token}"),)
    with open_channel(protected.address, RUN.for_client(), []) as channel:
        health = health_pb2_grpc.HealthStub(channel).Check(
            health_pb2.HealthCheckRequest(), timeout=WAIT_S, metadata=metadata
        )
        assert health.status == health_pb2.HealthCheckResponse.SERVING
        (answer,) = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(
            iter([reflection_pb2.ServerReflectionRequest(list_services="")]), timeout=WAIT_S, metadata=metadata
        )
        assert "slipstream.target.v1.Target" in {service.name for service in answer.list_services_response.service}


def test_callers_without_the_token_take_no_place_from_others(protected: RunningServer) -> None:
    with open_channel(protected.address, replace(RUN, token=None), []) as channel:
        for _ in range(200):
            with pytest.raises(grpc.RpcError):
                wire_grpc.TargetStub(channel).Describe(wire.DescribeRequest(), timeout=WAIT_S)
    with TargetClient(protected.address, RUN.for_client()) as client:
        assert capture_rows(client, a_job()) == {"context": 5, "last": 1}
