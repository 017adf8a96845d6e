"""A user's own Redis, as others run it: on TCP, with a password and a user of few rights; TLS is added by a proxy."""

from __future__ import annotations

import contextlib
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import redis
from waiting import wait_until

from services.replay.embedded import find_server
from services.security import make_certificate

USER = "trainer"
PASSWORD = "Xq7/p@ss:w#rd?&%"
"""With every character that a URL would take for its own."""

ADMIN_PASSWORD = "another-password-altogether"

MOST_PORTS_TRIED = 5
"""Between the look for a free port and Redis' start somebody else may take it."""

RIGHTS = "~slipstream:* &* +@all -@dangerous +info"
"""What docs/security.md asks for."""


@dataclass(frozen=True)
class OwnRedis:
    """A running server."""

    address: str

    @property
    def url(self) -> str:
        """Without the password."""
        return f"redis://{USER}@{self.address}/0"


@contextlib.contextmanager
def own_redis(folder: Path) -> Iterator[OwnRedis]:
    """Run a server with a default user whom nobody knows and one with `RIGHTS`."""
    for _ in range(MOST_PORTS_TRIED):
        with socket.create_server(("127.0.0.1", 0)) as probe:  # Redis cannot choose a port
            port = probe.getsockname()[1]
        with _server(folder, port) as process:
            if _comes_up(process, port):
                yield OwnRedis(f"127.0.0.1:{port}")
                return
    raise AssertionError(f"Redis ended {MOST_PORTS_TRIED} times, see {folder / 'redis.log'}")


def _comes_up(process: subprocess.Popen[str], port: int) -> bool:
    wait_until(lambda: _answers(port) or process.poll() is not None, "an answer of Redis")
    return process.poll() is None


def _answers(port: int) -> bool:
    client = redis.Redis(port=port, username=USER, password=PASSWORD)
    with contextlib.closing(client), contextlib.suppress(redis.exceptions.RedisError):
        return bool(client.ping())
    return False


@contextlib.contextmanager
def _server(folder: Path, port: int) -> Iterator[subprocess.Popen[str]]:
    settings = (
        f'bind 127.0.0.1\nport {port}\nsave ""\ndir {folder}\nlogfile {folder / "redis.log"}\n'
        f"requirepass {ADMIN_PASSWORD}\nuser {USER} on >{PASSWORD} {RIGHTS}\n"
        "maxmemory 256mb\nmaxmemory-policy noeviction\n"
    )
    process = subprocess.Popen([find_server(), "-"], stdin=subprocess.PIPE, text=True)
    try:
        assert process.stdin is not None
        process.stdin.write(settings)
        process.stdin.close()
        yield process
    finally:
        process.kill()
        process.wait()


@dataclass(frozen=True)
class TlsProxy:
    """Where it listens, and the certificate that it shows."""

    address: str
    certificate: Path


@contextlib.contextmanager
def tls_in_front_of(server: str, folder: Path) -> Iterator[TlsProxy]:
    """End TLS in front of a server that has none."""
    certificate, key = make_certificate(["127.0.0.1"])
    (folder / "certificate.pem").write_bytes(certificate)
    (folder / "key.pem").write_bytes(key)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "certificate.pem", folder / "key.pem")
    host, _, port = server.rpartition(":")
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept() -> None:
            with contextlib.suppress(OSError):  # the listener is closed
                while True:
                    caller, _ = listener.accept()
                    threading.Thread(target=serve, args=(caller,), daemon=True).start()

        def serve(caller: socket.socket) -> None:
            with contextlib.suppress(OSError), context.wrap_socket(caller, server_side=True) as outside:
                inside = socket.create_connection((host, int(port)))
                back = threading.Thread(target=pump, args=(inside, outside), daemon=True)
                back.start()
                pump(outside, inside)

        def pump(source: socket.socket, sink: socket.socket) -> None:
            with contextlib.suppress(OSError):
                while data := source.recv(65536):
                    sink.sendall(data)
            with contextlib.suppress(OSError):
                sink.shutdown(socket.SHUT_RDWR)

        threading.Thread(target=accept, daemon=True).start()
        yield TlsProxy(f"127.0.0.1:{listener.getsockname()[1]}", folder / "certificate.pem")
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
