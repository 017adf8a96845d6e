"""Redis' serialization protocol, version 2, as far as chunks need it: bytes in, bytes out, no socket.

`pack` leaves large arguments where they are in memory; `BulkInto` takes a large value to where it belongs.
"""

from __future__ import annotations

from collections.abc import Sequence

import redis
from typing_extensions import Buffer

Argument = str | int | bytes | memoryview
Reply = bytes | int | list["Reply"] | redis.exceptions.RedisError | None
"""Errors are values here; `None` is Redis' nil."""

COPIED_BYTES = 4096
"""Shorter arguments are copied into one buffer with what surrounds them; longer ones are sent from where they lie."""

CRLF = b"\r\n"

MOST_LINE_BYTES = 64 * 1024
"""No line of Redis' is longer, so what is longer does not come from a Redis."""

ERRORS: dict[str, type[redis.exceptions.RedisError]] = {
    "LOADING": redis.exceptions.BusyLoadingError,
    "NOAUTH": redis.exceptions.AuthenticationError,
    "NOPERM": redis.exceptions.NoPermissionError,
    "NOSCRIPT": redis.exceptions.NoScriptError,
    "OOM": redis.exceptions.OutOfMemoryError,
    "READONLY": redis.exceptions.ReadOnlyError,
    "WRONGPASS": redis.exceptions.AuthenticationError,
}
"""By the first word of an error, as redis-py has them."""


class ProtocolError(redis.exceptions.ConnectionError):
    """What came is no reply of Redis; nothing after it can be understood."""


class Incomplete(Exception):
    """The rest of the reply is not here yet."""


def pack(*commands: Sequence[Argument]) -> list[bytes | memoryview]:
    """The bytes of some commands, in pieces to be sent one after another."""
    pieces: list[bytes | memoryview] = []
    small = bytearray()
    for command in commands:
        small += b"*%d\r\n" % len(command)
        for argument in command:
            value = argument if isinstance(argument, bytes | memoryview) else str(argument).encode()
            num_bytes = memoryview(value).nbytes
            small += b"$%d\r\n" % num_bytes
            if num_bytes <= COPIED_BYTES:
                small += value
            else:
                pieces += [bytes(small), value]
                small.clear()
            small += CRLF
    return [*pieces, bytes(small)]


class ReplyParser:
    """Replies out of a stream of bytes that may be cut anywhere."""

    def __init__(self) -> None:
        self._pending = bytearray()

    @property
    def is_empty(self) -> bool:
        """Whether nothing is left of what was fed."""
        return not self._pending

    def feed(self, data: Buffer) -> None:
        """Append what came."""
        self._pending += data

    def next(self) -> Reply:
        """The next reply.

        Raises:
            Incomplete: Feed more.
            ProtocolError: This is no reply.
        """
        reply, end = self._parse(0)
        del self._pending[:end]
        return reply

    def _parse(self, start: int) -> tuple[Reply, int]:
        line, end = self._line(start)
        kind, rest = line[:1], line[1:]
        if kind == b"+":
            return rest, end
        if kind == b"-":
            return error_of(rest), end
        if kind == b":":
            return _number(line), end
        if line in (b"$-1", b"*-1"):
            return None, end
        if kind == b"$":
            return self._bulk(end, _length(line))
        if kind == b"*":
            return self._array(end, _length(line))
        raise _nonsense(line)

    def _line(self, start: int) -> tuple[bytes, int]:
        end = self._pending.find(CRLF, start)
        if end < 0:
            if len(self._pending) - start > MOST_LINE_BYTES:
                raise _nonsense(bytes(self._pending[start:]))
            raise Incomplete
        return bytes(self._pending[start:end]), end + len(CRLF)

    def _bulk(self, start: int, num_bytes: int) -> tuple[bytes, int]:
        end = start + num_bytes
        if len(self._pending) < end + len(CRLF):
            raise Incomplete
        tail = bytes(self._pending[end : end + len(CRLF)])
        if tail != CRLF:
            raise _nonsense(tail)
        return bytes(self._pending[start:end]), end + len(CRLF)

    def _array(self, start: int, length: int) -> tuple[list[Reply], int]:
        items: list[Reply] = []
        for _ in range(length):
            item, start = self._parse(start)
            items.append(item)
        return items, start


class BulkInto:
    """Takes the one reply to a GET to a place of the length it should have; nothing may follow it on the connection.

    Receive into `room`, and say with `received` how much came, until `room` is empty. Then:

    Attributes:
        num_bytes: Length of the value; None if there is none. Unless it is the place's, the place holds nothing of use.
        error: What Redis answered instead of a value.
    """

    def __init__(self, place: memoryview) -> None:
        self.num_bytes: int | None = None
        self.error: redis.exceptions.RedisError | None = None
        self._place = place
        self._head_bytes = len(b"$%d\r\n" % place.nbytes)
        self._head = bytearray()
        self._scratch = memoryview(bytearray(COPIED_BYTES))
        self._left = -1
        """Bytes of value and line end that have still to come; unknown before the first line is complete."""
        self._tail = bytearray()

    def room(self) -> memoryview:
        """Where the next bytes go; empty at the end of the reply."""
        if self._left < 0:
            # Not a byte of the value may land here, so no more is asked for than the first line should have.
            is_error = self._head[:1] == b"-"
            return self._scratch if is_error else self._scratch[: max(1, self._head_bytes - len(self._head))]
        value_left = self._left - len(CRLF)
        if value_left > 0 and self.num_bytes == self._place.nbytes:
            return self._place[-value_left:]
        if value_left > 0:
            sink = max(self._place, self._scratch, key=len)
            return sink[:value_left]
        return self._scratch[: self._left]

    def received(self, num_bytes: int) -> None:
        """Take note of bytes that came into `room`.

        Raises:
            ProtocolError: They are no reply to a GET.
        """
        if self._left < 0:
            self._head += self._scratch[:num_bytes]
            self._read_head()
            return
        if self._left <= len(CRLF):
            self._end(self._scratch[:num_bytes])
        self._left -= num_bytes

    def _read_head(self) -> None:
        line, end, rest = self._head.partition(CRLF)
        if not end:
            if len(line) > MOST_LINE_BYTES:
                raise _nonsense(bytes(line))
            return
        if line[:1] == b"-":
            self.error = error_of(bytes(line[1:]))
            self._left = 0
        elif line == b"$-1":
            self._left = 0
        elif line[:1] == b"$":
            self.num_bytes = _length(bytes(line))
            self._left = self.num_bytes + len(CRLF) - len(rest)
            self._end(rest[self.num_bytes :])
        else:
            raise _nonsense(bytes(line))
        if self._left < 0 or (rest and self.num_bytes is None):
            raise _nonsense(bytes(self._head))

    def _end(self, more: Buffer) -> None:
        self._tail += more
        if not CRLF.startswith(self._tail):
            raise _nonsense(bytes(self._tail))


def error_of(line: bytes) -> redis.exceptions.RedisError:
    """The exception that redis-py has for an error, given without its leading minus."""
    text = line.decode(errors="replace")
    word, _, rest = text.partition(" ")
    if word in ERRORS:
        return ERRORS[word](rest)
    return redis.exceptions.ResponseError(rest if word == "ERR" else text)


def _number(line: bytes) -> int:
    try:
        return int(line[1:])
    except ValueError as error:
        raise _nonsense(line) from error


def _length(line: bytes) -> int:
    length = _number(line)
    if length < 0:
        raise _nonsense(line)
    return length


def _nonsense(got: bytes) -> ProtocolError:
    return ProtocolError(f"it does not speak Redis' protocol, but sent {got[:40]!r}")
