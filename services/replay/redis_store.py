"""The chunk store in Redis itself: one string a chunk.

A chunk takes two commands in one go: the script `place` checks it against what was reserved and makes its key, empty;
`SET … XX` then fills a key that is there and nothing else. So a payload that comes after its sample was freed leaves
nothing behind, and no reply has to be awaited between the two. Redis keeps the buffer that it received a large value
of SET in, so the bytes are not copied there.

Only a chunk that is new may go without waiting. What `place` refuses has then no key, and the SET does nothing either;
a chunk that replaces one has, so the SET waits for the answer to its `place`.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import redis
from typing_extensions import Buffer, override

from services.contracts import CaptureJob
from services.errors import ReplayUnavailableError
from services.replay import refusals
from services.replay.connect import Client
from services.replay.keys import chunk_key
from services.replay.raw_connection import RawConnection, RawConnections
from services.replay.resp import Argument, Reply, pack
from services.replay.scripts import source
from services.replay.store import ChunkReader, ChunkStore, ChunkWriter, OneByOne
from services.replay.urls import safe_url

MOST_UNANSWERED_BYTES = 16 * 1024**2
"""How far a writer runs ahead of Redis' answers: so soon does it notice that its attempt was replaced."""

PLACE = source("place")
PLACE_SHA = hashlib.sha1(PLACE.encode(), usedforsecurity=False).hexdigest()


class RedisChunkStore(ChunkStore):
    """Chunks under the prefix of their table, in the same Redis."""

    def __init__(self, client: Client, prefix: str) -> None:
        """Attach to a table's prefix. Connections are opened when they are needed, one for each thread at work.

        Args:
            client: From `connect`: which server, login and time-outs.
            prefix: Of the table's keys.
        """
        self._client = client
        self._prefix = prefix
        self._connections = RawConnections(client)

    @override
    def open(self) -> None:
        pass  # whoever has connected reaches them

    @override
    @contextlib.contextmanager
    def writing(self, job: CaptureJob) -> Iterator[ChunkWriter]:
        with self._connections.borrow() as connection:
            writer = _Writer(connection, self._prefix, job, safe_url(self._client.url))
            yield writer
            writer.flush()

    @override
    def read_into(self, job: CaptureJob, index: int, place: Buffer) -> None:
        view = memoryview(place).cast("B")
        with self._connections.borrow() as connection:
            num_bytes = connection.get_into(chunk_key(self._prefix, job.capture, job.attempt, index), view)
        if num_bytes is None:
            raise refusals.missing_payload(job, index)
        if num_bytes != view.nbytes:
            raise refusals.other_payload_size(job, index, num_bytes, view.nbytes)

    @override
    @contextlib.contextmanager
    def reading(self, job: CaptureJob) -> Iterator[ChunkReader]:
        yield OneByOne(self, job)

    @override
    def close(self) -> None:
        self._connections.close()


@dataclass(frozen=True)
class _Sent:
    """A chunk whose SET is not answered yet, and its `place` neither unless that is said."""

    num_bytes: int
    is_placed: bool


class _Writer(ChunkWriter):
    """Runs ahead of Redis' answers; they are read when too many bytes are unanswered, and by `flush`."""

    def __init__(self, connection: RawConnection, prefix: str, job: CaptureJob, server: str) -> None:
        self._connection = connection
        self._prefix = prefix
        self._job = job
        self._server = server
        self._num_chunks: int | None = None
        """How many the attempt has; unknown before the first answer, which nothing goes ahead of."""
        self._unanswered: deque[_Sent] = deque()
        self._unanswered_bytes = 0

    @override
    def write(self, index: int, payload: Buffer) -> None:
        view = memoryview(payload).cast("B")
        key = chunk_key(self._prefix, self._job.capture, self._job.attempt, index)
        place, fill = self._place(index, view.nbytes), ("SET", key, view, "XX")
        with self._given_up_on_error():
            is_new = index == self._num_chunks
            if is_new:
                self._connection.send(pack(place, fill), 2)
                self._num_chunks = index + 1
            else:
                self._flush()
                self._num_chunks = self._ask_place(place)
                self._connection.send(pack(fill), 1)
            self._unanswered.append(_Sent(view.nbytes, is_placed=not is_new))
            self._unanswered_bytes += view.nbytes
            while self._unanswered_bytes > MOST_UNANSWERED_BYTES:
                self._answer()

    @override
    def flush(self) -> None:
        with self._given_up_on_error():
            self._flush()

    def _place(self, index: int, num_bytes: int) -> tuple[Argument, ...]:
        return ("EVALSHA", PLACE_SHA, 1, self._prefix, self._job.capture, self._job.attempt, index, num_bytes)

    def _ask_place(self, place: tuple[Argument, ...]) -> int:
        self._connection.send(pack(place), 1)
        try:
            answer = self._connection.reply()
        except redis.exceptions.NoScriptError:
            self._connection.send(pack(("EVAL", PLACE, *place[2:])), 1)
            answer = self._connection.reply()
        return self._check_placed(answer)

    def _flush(self) -> None:
        while self._unanswered:
            self._answer()

    def _answer(self) -> None:
        sent = self._unanswered.popleft()
        self._unanswered_bytes -= sent.num_bytes
        if not sent.is_placed:
            self._check_placed(self._place_answer())
        if self._connection.reply() is None:
            raise refusals.not_being_inserted(self._job, "gone", None)

    def _place_answer(self) -> Reply:
        try:
            return self._connection.reply()
        except redis.exceptions.NoScriptError as error:
            raise ReplayUnavailableError(
                f"Redis at {self._server} has forgotten its scripts while capture {self._job.capture} was on its way, "
                "as SCRIPT FLUSH makes it do: the capture is made again"
            ) from error

    def _check_placed(self, answer: Reply) -> int:
        assert isinstance(answer, list)
        words = [part if isinstance(part, bytes) else b"%d" % part for part in answer if isinstance(part, bytes | int)]
        status, rest = words[0], words[1:]
        if refusal := refusals.refused_chunk(self._job, status.decode(), rest):
            raise refusal
        return int(rest[0])

    @contextlib.contextmanager
    def _given_up_on_error(self) -> Iterator[None]:
        """Of what was on its way nothing may be taken for an answer to something later."""
        try:
            yield
        except BaseException:
            self._connection.close()
            raise
