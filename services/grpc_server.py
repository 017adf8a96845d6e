"""What our gRPC servers share: token and TLS, health checking, reflection, bounds on calls and messages."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from services.grpc_access import add_port, interceptors
from services.security import Credentials


class GrpcServer:
    """One service on one port: bound by its making, serving from `start` until `stop`.

    Attributes:
        address: host:port that clients connect to.
    """

    def __init__(
        self,
        service: str,
        handler: grpc.GenericRpcHandler,
        address: str,
        credentials: Credentials,
        *,
        max_calls: int,
        max_message_bytes: int,
        options: Sequence[tuple[str, Any]] = (),
    ) -> None:
        """Bind the port. Check before that the credentials allow it (`services.security.check_listening`).

        Args:
            service: Full name of the service.
            handler: Of its methods.
            address: host:port; port 0 takes a free one.
            credentials: Token, certificate and key; those that are missing are not asked for, or not used. Health
                checking and reflection need the token, too.
            max_calls: Calls served at once, a thread each; more are refused with RESOURCE_EXHAUSTED.
            max_message_bytes: Longest message taken.
            options: More options of gRPC.

        Raises:
            RuntimeError: The address cannot be bound.
        """
        self._service = service
        self._server = grpc.server(
            ThreadPoolExecutor(max_calls, thread_name_prefix=f"{service.rpartition('.')[2].lower()}-rpc"),
            maximum_concurrent_rpcs=max_calls,
            interceptors=interceptors(credentials),
            options=[
                ("grpc.so_reuseport", 0),  # a taken port is an error, not a shared one
                ("grpc.max_receive_message_length", max_message_bytes),
                *options,
            ],
        )
        self._health = health.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        self._server.add_generic_rpc_handlers((handler,))
        names = (service, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)
        port = add_port(self._server, address, credentials)
        self.address = f"{address.rpartition(':')[0]}:{port}"

    def start(self) -> None:
        """Serve."""
        self._server.start()
        for name in ("", self._service):
            self._health.set(name, health_pb2.HealthCheckResponse.SERVING)

    def stop(self, grace_s: float = 0.0) -> None:
        """Refuse new calls, let running ones go on for `grace_s` seconds, then end them."""
        self._health.enter_graceful_shutdown()
        self._server.stop(grace_s).wait()
