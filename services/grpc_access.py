"""Token and TLS on gRPC: what a server checks before any method, how a client connects, and why it was turned away."""

from __future__ import annotations

import contextlib
import socket
import ssl
from collections.abc import Callable, Sequence
from typing import Any

import grpc

from services.errors import UsageError
from services.security import Credentials, is_loopback

AUTHORIZATION = "authorization"

HUNG_UP = ("Socket closed", "Connection reset", "Broken pipe")
"""What gRPC says of an end that hung up, by how much of what was sent that end had read."""

PROBE_TIMEOUT_S = 10.0
"""How long a client that was cut off tries whether the other end speaks TLS."""


class TokenInterceptor(grpc.ServerInterceptor):
    """Lets a call through only with the token: every method, health checking and reflection too.

    A call without it is answered before its message is read, so it costs nothing and holds no place for long.
    """

    def __init__(self, credentials: Credentials) -> None:
        self._credentials = credentials

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], grpc.RpcMethodHandler | None],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler | None:
        """The method's handler, or one that refuses."""
        given = [value for key, value in handler_call_details.invocation_metadata if key == AUTHORIZATION]
        refusal = self._credentials.refusal(given[0] if given else None)
        if refusal is None:
            return continuation(handler_call_details)

        def refuse(_: Any, context: grpc.ServicerContext) -> None:
            context.abort(grpc.StatusCode.UNAUTHENTICATED, refusal)

        return grpc.stream_stream_rpc_method_handler(refuse)


def interceptors(credentials: Credentials) -> list[grpc.ServerInterceptor]:
    """What a server with these credentials is built with."""
    return [TokenInterceptor(credentials)] if credentials.token is not None else []


def add_port(server: grpc.Server, address: str, credentials: Credentials) -> int:
    """Have a server listen, with TLS if it has a certificate; returns the port.

    Raises:
        RuntimeError: The address cannot be bound.
    """
    if credentials.certificate is None:
        return int(server.add_insecure_port(address))
    pair = (credentials.key, credentials.certificate)
    return int(server.add_secure_port(address, grpc.ssl_server_credentials([pair])))


def open_channel(address: str, credentials: Credentials, options: Sequence[tuple[str, Any]]) -> grpc.Channel:
    """A channel to host:port; with a certificate it accepts that one alone.

    Raises:
        UsageError: The token would be sent where others can read it.
    """
    if credentials.certificate is None:
        if credentials.token and not credentials.insecure and not is_loopback(_host(address)):
            raise UsageError(
                f"a token for {address} would travel without TLS, and whoever reads it could use it: give the "
                "server's certificate, or say insecure on a network you trust"
            )
        return grpc.insecure_channel(address, options=options)
    name = [("grpc.ssl_target_name_override", credentials.name)] if credentials.name else []
    channel_credentials = grpc.ssl_channel_credentials(credentials.certificate)
    return grpc.secure_channel(address, channel_credentials, options=[*options, *name])


def call_metadata(credentials: Credentials) -> list[tuple[str, str]]:
    """What every call carries."""
    return [(AUTHORIZATION, f"Bearer {credentials.token}")] if credentials.token else []


def why_refused(error: grpc.RpcError, address: str, credentials: Credentials) -> str | None:
    """What a failed call says about token and TLS, and the way out; None if it failed for another reason."""
    details = error.details() or ""
    if error.code() == grpc.StatusCode.UNAUTHENTICATED:
        return details
    if error.code() != grpc.StatusCode.UNAVAILABLE:
        return None
    if "certificate has expired" in details or "certificate is not yet valid" in details:
        return "its certificate is not valid at this time: renew it, or set the clocks"
    if "CERTIFICATE_VERIFY_FAILED" in details:
        return "it shows another certificate than the one given here: give this server's own, or the one that signed it"
    if "Hostname Verification" in details:
        return (
            f"its certificate does not stand for {credentials.name or _host(address)}: connect by a name or address "
            "that is in it, or make one for this address"
        )
    if "WRONG_VERSION_NUMBER" in details:
        return "it speaks no TLS, and a certificate was given here: connect without, or start it with one"
    has_hung_up = any(words in details for words in HUNG_UP)
    if credentials.certificate is None and has_hung_up and _speaks_tls(address):
        return "it speaks TLS, and no certificate was given here: give the certificate that the server was started with"
    return None


def _host(address: str) -> str:
    return address.rpartition(":")[0]


def _speaks_tls(address: str) -> bool:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False  # nothing is sent; whoever answers in TLS is what we ask for
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    host, _, port = address.rpartition(":")
    with contextlib.suppress(OSError, ValueError):
        plain = socket.create_connection((host.strip("[]"), int(port)), PROBE_TIMEOUT_S)
        with plain, context.wrap_socket(plain):
            return True
    return False
