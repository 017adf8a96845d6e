"""Connections to Redis for payloads: from the caller's memory to the socket and back, without a copy between.

redis-py opens the socket (unix, TCP or TLS, with login and time-outs as in its URL); from then on it is driven here.
"""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import threading
from collections.abc import Iterator, Sequence

import redis

from services.replay.connect import Client, translated
from services.replay.resp import BulkInto, Incomplete, Reply, ReplyParser, pack

BUFFER_BYTES = 4 * 1024**2
"""Socket buffers of a unix socket; the kernel sizes those of TCP by itself, and stops to do so once they are set."""

RECEIVE_BYTES = 64 * 1024


class RawConnection:
    """One connection, used by one thread at a time. Every method raises what `Client` would."""

    def __init__(self, client: Client) -> None:
        """Connect.

        Args:
            client: Whose server, login and time-outs to use.

        Raises:
            ReplayUnavailableError: The server does not answer, or refuses the login.
        """
        pool = client.connection_pool
        self._url = client.url
        self._connection = pool.connection_class(**pool.connection_kwargs)
        with translated(self._url):
            self._connection.connect()
        self._socket: socket.socket = self._connection._sock
        if self._socket.family == socket.AF_UNIX:
            for buffer in (socket.SO_SNDBUF, socket.SO_RCVBUF):
                self._socket.setsockopt(socket.SOL_SOCKET, buffer, BUFFER_BYTES)
        self._parser = ReplyParser()
        self._received = memoryview(bytearray(RECEIVE_BYTES))
        self._due = 0
        """Replies that have still to come."""
        self._has_failed = False

    @property
    def is_clean(self) -> bool:
        """Whether nothing is on its way in either direction, and nothing has failed."""
        return not self._has_failed and self._due == 0 and self._parser.is_empty

    def is_stale(self) -> bool:
        """Whether the server has closed an idle connection, or said something that nobody asked for."""
        if isinstance(self._socket, ssl.SSLSocket) and self._socket.pending():
            return True
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        return bool(poll.poll(0))

    def send(self, pieces: Sequence[bytes | memoryview], num_replies: int) -> None:
        """Send some commands, as `pack` makes them, without waiting for their replies."""
        with self._failing("writing to"):
            self._due += num_replies
            if isinstance(self._socket, ssl.SSLSocket):
                for piece in pieces:
                    self._socket.sendall(piece)
            else:
                _send_all(self._socket, pieces)

    def reply(self) -> Reply:
        """Wait for the next reply.

        Raises:
            redis.exceptions.ResponseError: It is an error that `Client` leaves as it is.
        """
        with self._failing("reading from"):
            while True:
                try:
                    answer = self._parser.next()
                    break
                except Incomplete:
                    self._parser.feed(self._received[: self._receive(self._received)])
        self._due -= 1
        if isinstance(answer, redis.exceptions.RedisError):
            with translated(self._url):
                raise answer
        return answer

    def get_into(self, key: str, place: memoryview) -> int | None:
        """Read a value to where it belongs.

        Args:
            key: Its key.
            place: Bytes, writable.

        Returns:
            The value's length, None if there is none. Where it is another than the place's nothing of use is there.
        """
        self.send(pack(("GET", key)), 1)
        bulk = BulkInto(place)
        with self._failing("reading from"):
            while room := bulk.room():
                bulk.received(self._receive(room))
        self._due -= 1
        if bulk.error is not None:
            with translated(self._url):
                raise bulk.error
        return bulk.num_bytes

    def close(self) -> None:
        """Close it; what was on its way is given up."""
        self._has_failed = True
        self._connection.disconnect()

    def _receive(self, room: memoryview) -> int:
        num_bytes = self._socket.recv_into(room)
        if not num_bytes:
            raise redis.exceptions.ConnectionError("Connection closed by server.")
        return num_bytes

    @contextlib.contextmanager
    def _failing(self, doing: str) -> Iterator[None]:
        """Have failures of the socket look as those of redis-py; after one the connection is of no use."""
        try:
            with translated(self._url):
                if self._has_failed:
                    raise redis.exceptions.ConnectionError("the connection was closed after an error")
                try:
                    yield
                except TimeoutError as error:
                    raise redis.exceptions.TimeoutError(f"Timeout {doing} socket") from error
                except OSError as error:
                    raise redis.exceptions.ConnectionError(
                        f"Error {error.errno} while {doing} socket. {error.strerror}."
                    ) from error
        except BaseException:
            self._has_failed = True
            raise


class RawConnections:
    """Connections to one server that are opened as threads need them, and kept for the next."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._lock = threading.Lock()
        self._idle: list[RawConnection] = []
        self._is_closed = False

    @contextlib.contextmanager
    def borrow(self) -> Iterator[RawConnection]:
        """A connection for this thread alone. What is not clean at the end is closed.

        Raises:
            ReplayUnavailableError: The server does not answer.
        """
        connection = self._take()
        try:
            yield connection
        finally:
            with self._lock:
                is_kept = connection.is_clean and not self._is_closed
                if is_kept:
                    self._idle.append(connection)
            if not is_kept:
                connection.close()

    def close(self) -> None:
        """Close what is not in use, and the rest when it is given back. Again: nothing happens."""
        with self._lock:
            self._is_closed = True
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def _take(self) -> RawConnection:
        while True:
            with self._lock:
                connection = self._idle.pop() if self._idle else None
            if connection is None:
                return RawConnection(self._client)
            if not connection.is_stale():
                return connection
            connection.close()


def _send_all(connected: socket.socket, pieces: Sequence[bytes | memoryview]) -> None:
    views = [memoryview(piece) for piece in pieces]
    while views:
        num_sent = connected.sendmsg(views)
        while views and num_sent >= views[0].nbytes:
            num_sent -= views.pop(0).nbytes
        if num_sent:
            views[0] = views[0][num_sent:]
