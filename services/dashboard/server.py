"""Serves a dashboard: `python -m services.dashboard.server` for a driver, `serve` for the command line.

A driver holds the other end of standard input: end of file ends the dashboard, however the driver died.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import socket
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

import uvicorn
from pydantic import Field, TypeAdapter

from services.dashboard.access import Access
from services.dashboard.app import create_app
from services.dashboard.controls import Controls
from services.dashboard.feed import Feed
from services.dashboard.remote import RayControls
from services.errors import SlipstreamError
from services.reading import read_json

PUBLISHED = "dashboard.json"
"""In the output directory: where the driver's own dashboard is, for this user alone."""

CLOSE_TIMEOUT_S = 10
"""How long an end waits for pages that take no more bytes."""


@dataclass(frozen=True)
class Published:
    """Where a dashboard is and what opens it."""

    url: str
    """With the token in its fragment, which no browser sends anywhere."""
    token: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{16,}$")]
    pid: int


_PUBLISHED = TypeAdapter(Published)


def listen(access: Access, port: int) -> socket.socket:
    """A listening socket, which can be connected to from now on; port 0 takes a free one.

    Raises:
        UsageError: The host is beyond this machine, and the page would not be encrypted.
        SlipstreamError: The port is taken, or the host is none of this machine's.
    """
    access.check()
    family = socket.AF_INET6 if ":" in access.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((access.host, port))
        listener.listen()
    except OSError as error:
        listener.close()
        raise SlipstreamError(
            f"the dashboard cannot listen on {access.host} port {port}: {error.strerror}; choose another with --port, "
            "or --port 0 for any free one"
        ) from error
    return listener


def published(access: Access, listener: socket.socket) -> Published:
    """What a listening dashboard tells others."""
    host, port = listener.getsockname()[:2]
    name = socket.gethostname() if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
    scheme = "https" if access.has_tls else "http"
    return Published(url=f"{scheme}://{name}:{port}/#token={access.token}", token=access.token, pid=os.getpid())


class Server(uvicorn.Server):
    """A web server that lets every page hear of the end before its connection is closed."""

    def __init__(self, feed: Feed, access: Access, controls: Controls) -> None:
        config = uvicorn.Config(
            create_app(feed, access, controls),
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=CLOSE_TIMEOUT_S,
            server_header=False,
            ws="none",
            ssl_certfile=access.certificate,
            ssl_keyfile=access.key,
        )
        super().__init__(config)
        self._feed = feed

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End the streams, then the connections."""
        await self._feed.close()
        await super().shutdown(sockets)


def serve(feed: Feed, access: Access, controls: Controls, listener: socket.socket, *, until_eof: bool = False) -> None:
    """Serve until Ctrl-C or SIGTERM, or until standard input ends."""
    server = Server(feed, access, controls)

    async def run() -> None:
        if until_eof:
            asyncio.get_running_loop().add_reader(sys.stdin, end_at_eof)
        await server.serve(sockets=[listener])

    def end_at_eof() -> None:
        if not os.read(sys.stdin.fileno(), 4096):
            asyncio.get_running_loop().remove_reader(sys.stdin)
            server.should_exit = True

    with contextlib.suppress(KeyboardInterrupt):  # uvicorn has ended in order, and hands the signal on
        asyncio.run(run())


def main() -> int:
    """A driver's dashboard: tells it in one line of JSON where it is, or why it is not."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output-dir", required=True, type=Path)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    arguments = parser.parse_args()
    file = arguments.output_dir / PUBLISHED
    try:
        access, listener = _take_over(file, arguments.host) or _begin(arguments.host, arguments.port)
    except SlipstreamError as error:
        _tell({"error": str(error)})
        return 1
    place = published(access, listener)
    _publish(file, place)
    _tell(asdict(place))
    try:
        serve(
            Feed(arguments.output_dir, follows_driver=True),
            access,
            RayControls(arguments.output_dir, stays_attached=True),
            listener,
            until_eof=True,
        )
    finally:
        file.unlink(missing_ok=True)
    return 0


def _begin(host: str, port: int) -> tuple[Access, socket.socket]:
    access = Access(host)
    return access, listen(access, port)


def _take_over(file: Path, host: str) -> tuple[Access, socket.socket] | None:
    """The place of a dashboard that was killed, so that open pages find it; None if there is none or it is taken."""
    try:
        before = _PUBLISHED.validate_python(read_json(file.read_bytes()))
        access = Access(host, token=before.token)
        return access, listen(access, urlsplit(before.url).port or 0)
    except (FileNotFoundError, ValueError, SlipstreamError):
        return None


def _publish(file: Path, place: Published) -> None:
    new = file.with_name(f".{file.name}.new")
    new.unlink(missing_ok=True)
    with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as out:
        json.dump(asdict(place), out)
    new.replace(file)


def _tell(answer: dict[str, str | int]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
