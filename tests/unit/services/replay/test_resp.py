"""Redis' protocol: whatever pieces a stream comes in, the same replies are read from it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st

from services.replay.resp import COPIED_BYTES, BulkInto, Incomplete, ProtocolError, ReplyParser, error_of, pack

WORDS = st.text("abcXYZ 019_-", min_size=1, max_size=12)


def encode(reply: Any) -> bytes:
    """A reply as Redis writes it."""
    if reply is None:
        return b"$-1\r\n"
    if isinstance(reply, int):
        return b":%d\r\n" % reply
    if isinstance(reply, bytes):
        return b"$%d\r\n%s\r\n" % (len(reply), reply)
    if isinstance(reply, list):
        return b"*%d\r\n" % len(reply) + b"".join(map(encode, reply))
    assert isinstance(reply, redis.exceptions.ResponseError)
    return b"-ERR %s\r\n" % str(reply).encode()


REPLIES = st.recursive(
    st.none() | st.integers(-(2**63), 2**63 - 1) | st.binary(max_size=40) | WORDS.map(redis.exceptions.ResponseError),
    lambda inner: st.lists(inner, max_size=4),
    max_leaves=8,
)


def pieces_of(stream: bytes, cuts: Sequence[int]) -> list[bytes]:
    """The stream, cut at the given places."""
    at = [0, *sorted(cut % (len(stream) + 1) for cut in cuts), len(stream)]
    return [stream[start:end] for start, end in pairwise(at)]


def read_all(parser: ReplyParser) -> Iterator[Any]:
    while True:
        try:
            yield parser.next()
        except Incomplete:
            return


def read_bulk(stream: bytes, sizes: Sequence[int], place: bytearray) -> tuple[BulkInto, int]:
    """Receive from a stream, at most so many bytes at a time; the reply, and how many bytes it took."""
    bulk, at = BulkInto(memoryview(place)), 0
    while room := bulk.room():
        num_bytes = min(len(room), sizes[at % len(sizes)], len(stream) - at)
        assert num_bytes, "it asked for more than the reply has"
        room[:num_bytes] = stream[at : at + num_bytes]
        bulk.received(num_bytes)
        at += num_bytes
    return bulk, at


def alike(reply: Any) -> Any:
    """Something to compare: exceptions equal only themselves."""
    if isinstance(reply, list):
        return [alike(item) for item in reply]
    return repr(reply) if isinstance(reply, Exception) else reply


@given(st.lists(REPLIES, max_size=5), st.lists(st.integers(0, 10**6), max_size=12))
def test_replies_are_read_wherever_the_stream_is_cut(replies: list[Any], cuts: list[int]) -> None:
    parser, read = ReplyParser(), []
    for piece in pieces_of(b"".join(map(encode, replies)), cuts):
        parser.feed(piece)
        read += list(read_all(parser))
    assert alike(read) == alike(replies)
    assert parser.is_empty


def test_simple_strings_are_bytes_and_nil_arrays_are_none() -> None:
    parser = ReplyParser()
    parser.feed(b"+OK\r\n*-1\r\n*0\r\n$0\r\n\r\n+half")
    assert list(read_all(parser)) == [b"OK", None, [], b""]
    assert not parser.is_empty


@pytest.mark.parametrize(
    "stream",
    [
        b"HTTP/1.1 400 Bad Request\r\n",
        b"$x\r\n",
        b":\r\n",
        b"$2\r\nabcd",
        b"$-2\r\n",
        b"*1\r\n!\r\n",
        b"-" + bytes(70_000),
    ],
)
def test_what_is_no_reply_is_refused(stream: bytes) -> None:
    parser = ReplyParser()
    parser.feed(stream)
    with pytest.raises(ProtocolError, match="does not speak"):
        list(read_all(parser))


@pytest.mark.parametrize(
    ("line", "kind", "text"),
    [
        ("OOM command not allowed", redis.exceptions.OutOfMemoryError, "command not allowed"),
        ("NOPERM no key", redis.exceptions.NoPermissionError, "no key"),
        ("NOSCRIPT No matching", redis.exceptions.NoScriptError, "No matching"),
        ("NOAUTH Authentication", redis.exceptions.AuthenticationError, "Authentication"),
        ("LOADING it", redis.exceptions.BusyLoadingError, "it"),
        ("ERR unknown command", redis.exceptions.ResponseError, "unknown command"),
        ("BUSY a script runs", redis.exceptions.ResponseError, "BUSY a script runs"),
    ],
)
def test_errors_are_those_of_redis_py(line: str, kind: type[Exception], text: str) -> None:
    error = error_of(line.encode())
    assert (type(error), str(error)) == (kind, text)


@given(
    st.lists(
        st.lists(
            st.integers(0, 10**9)
            | WORDS
            | st.binary(max_size=20)
            | st.integers(COPIED_BYTES, COPIED_BYTES + 3).map(lambda size: memoryview(bytes(size))),
            min_size=1,
            max_size=5,
        ),
        min_size=1,
        max_size=3,
    )
)
def test_commands_are_packed_as_arrays_of_strings(commands: list[list[Any]]) -> None:
    parser = ReplyParser()
    parser.feed(b"".join(pack(*commands)))
    sent = [
        [bytes(part) if isinstance(part, bytes | memoryview) else str(part).encode() for part in it] for it in commands
    ]
    assert list(read_all(parser)) == sent


def test_large_arguments_are_not_copied() -> None:
    payload = bytearray(COPIED_BYTES + 1)
    head, value, tail = pack(("SET", "key", memoryview(payload), "XX"), ("PING",))
    assert isinstance(value, memoryview)
    assert value.obj is payload
    assert head == b"*4\r\n$3\r\nSET\r\n$3\r\nkey\r\n$%d\r\n" % len(payload)
    assert tail == b"\r\n$2\r\nXX\r\n*1\r\n$4\r\nPING\r\n"


@given(st.binary(max_size=300), st.integers(0, 300), st.lists(st.integers(1, 200), min_size=1, max_size=9))
def test_value_lands_in_its_place_whatever_comes_at_a_time(value: bytes, num_wanted: int, sizes: list[int]) -> None:
    stream = encode(value)
    for place in (bytearray(len(value)), bytearray(num_wanted)):
        bulk, num_read = read_bulk(stream, sizes, place)
        assert (bulk.num_bytes, bulk.error, num_read) == (len(value), None, len(stream))
        assert place == value or len(place) != len(value)


@given(st.integers(0, 10**7), st.lists(st.integers(1, 20), min_size=1, max_size=9))
def test_missing_value_is_none(num_wanted: int, sizes: list[int]) -> None:
    bulk, num_read = read_bulk(b"$-1\r\n", sizes, bytearray(num_wanted))
    assert (bulk.num_bytes, bulk.error, num_read) == (None, None, 5)


@given(st.integers(0, 2000), st.lists(st.integers(1, 400), min_size=1, max_size=9), st.integers(0, 6000))
def test_error_in_place_of_a_value_is_kept(num_wanted: int, sizes: list[int], length: int) -> None:
    stream = b"-NOPERM " + b"x" * length + b"\r\n"
    bulk, num_read = read_bulk(stream, sizes, bytearray(num_wanted))
    assert isinstance(bulk.error, redis.exceptions.NoPermissionError)
    assert (bulk.num_bytes, num_read, len(str(bulk.error))) == (None, len(stream), length)


@pytest.mark.parametrize(
    "stream",
    [
        b":1\r\n" + bytes(20),
        b"+OK\r\n" + bytes(20),
        b"$-2\r\n",
        b"$4\r\nabcdxx",
        b"$x\r\n",
        b"$1\r\nabcd",
        b"-" + bytes(70_000),
    ],
)
def test_what_is_no_value_is_refused(stream: bytes) -> None:
    with pytest.raises(ProtocolError, match="does not speak"):
        read_bulk(stream, [7], bytearray(4))
