"""One Insert stream of the replay service: what its producer sends, step by step, and what it is answered."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Iterator

import grpc

from services.contracts import MAX_CHUNK_BYTES, TableSignature
from services.errors import DeadlineError, ReplayRequestError, ReplayUnavailableError, SignatureError
from services.replay.arrival import check_arrival
from services.replay.incoming import IncomingSample
from services.replay.intake import Held, Intake
from services.replay.rules import Admission
from services.replay.service_config import ServiceConfig
from services.replay.store import ChunkWriter
from services.replay.wire import MAX_TOKENS, Begin, Commit, Open, read_chunk, read_step
from services.target.framing import FramedChunk
from services.wire import replay_pb2 as wire

POLL_S = 0.01
"""How often a sample that waits for room asks again."""

SAY_WAIT_S = 2.0
"""How often a producer hears that its sample waits."""

LOOK_S = 0.2
"""How often a stream between two samples looks whether the service stops."""

STOPPING = "the replay service is stopping: send what was not committed again later"

QUEUED_MESSAGES = 2
"""Messages that wait to be handled. The rest stays with gRPC's own flow control."""


class Gone(Exception):
    """The producer has ended its call, or its connection dropped."""


class Arrivals:
    """The messages of one call. gRPC's own iterator waits without a deadline, so a thread of its own reads it."""

    def __init__(self, messages: Iterator[bytes]) -> None:
        self._messages = messages
        self._queue: queue.Queue[bytes | None] = queue.Queue(QUEUED_MESSAGES)
        self._closed = threading.Event()
        self._dropped = False
        threading.Thread(target=self._read, name="insert-reader", daemon=True).start()

    def next(self, timeout_s: float) -> bytes | None:
        """The next message; None at the end of the stream.

        Raises:
            Gone: The call is over.
            TimeoutError: Nothing came in time.
        """
        try:
            message = self._queue.get(timeout=timeout_s)
        except queue.Empty as error:
            raise TimeoutError from error
        if message is None and self._dropped:
            raise Gone
        return message

    def close(self) -> None:
        """Let the reading thread end."""
        self._closed.set()

    def _read(self) -> None:
        try:
            for message in self._messages:
                self._put(message)
        except grpc.RpcError:
            self._dropped = True
        self._put(None)

    def _put(self, message: bytes | None) -> None:
        while not self._closed.is_set():
            try:
                return self._queue.put(message, timeout=1.0)
            except queue.Full:
                continue
        return None


class InsertStream:
    """Handles one call; `answers` is its response."""

    def __init__(
        self,
        messages: Iterator[bytes],
        context: grpc.ServicerContext,
        *,
        intake: Intake,
        signature: TableSignature,
        config: ServiceConfig,
        reuse: int,
        stopping: threading.Event,
    ) -> None:
        self._arrivals = Arrivals(messages)
        self._intake = intake
        self._signature = signature
        self._config = config
        self._reuse = reuse
        self._stopping = stopping
        self._over = threading.Event()
        self._producer = context.peer()
        if not context.add_callback(self._over.set):
            self._over.set()

    def answers(self) -> Iterator[wire.InsertResponse]:
        """Take the stream's samples in, one after another.

        Raises:
            SlipstreamError: What ends the stream; the sample in progress is given up.
            Gone: There is nobody to tell.
        """
        try:
            yield self._open()
            while (step := self._next_begin()) is not None:
                if not isinstance(step, Begin):
                    raise ReplayRequestError(f"{_name(step)} came where a begin was due")
                yield from self._insert(step)
        finally:
            self._arrivals.close()

    def _open(self) -> wire.InsertResponse:
        step = self._next(self._config.progress_s, "an open")
        if not isinstance(step, Open):
            raise ReplayRequestError(f"{_name(step)} came where an open was due")
        if step.signature != self._signature:
            raise SignatureError(
                f"this replay table holds samples of {self._signature.model_dump_json()}, not of "
                f"{step.signature.model_dump_json()[:1000]} ({step.signature.differences(self._signature)[:1000]}): "
                "capture with the same target, layers and dtype, or give these samples a service of their own"
            )
        self._producer = step.producer or self._producer
        return wire.InsertResponse(opened=wire.Opened(max_chunk_bytes=MAX_CHUNK_BYTES, max_tokens=MAX_TOKENS))

    def _insert(self, begin: Begin) -> Iterator[wire.InsertResponse]:
        sample_id = begin.job.capture
        if self._intake.recent.has(begin.job, self._signature):
            yield _committed(sample_id, already=True)
            return
        with self._intake.hold(begin.job) as held:
            yield from self._wait_for_room(held, begin.max_wait_s or self._config.max_wait_s)
            # Again: its first try may have been committed while this one waited.
            if held.is_committed or self._intake.recent.has(begin.job, self._signature):
                yield _committed(sample_id, already=True)
                return
            incoming = IncomingSample(held.job, self._signature)
            with self._intake.table.writing(held.job) as writer:
                yield _credit(sample_id, incoming.credit())
                while not isinstance(step := self._next(self._config.progress_s, f"sample {sample_id}"), Commit):
                    if not isinstance(step, FramedChunk):
                        raise ReplayRequestError(f"{_name(step)} came within sample {sample_id}")
                    self._store(step, incoming, writer)
                    if more := incoming.credit():
                        yield _credit(sample_id, more)
            if step.sample_id != sample_id:
                raise ReplayRequestError(f"a commit of sample {step.sample_id} came within sample {sample_id}")
            held.commit(incoming.sample(self._producer))
        yield _committed(sample_id, already=False)

    def _wait_for_room(self, held: Held, max_wait_s: float) -> Iterator[wire.InsertResponse]:
        began_s = said_s = self._intake.clock()
        deadline_s = began_s + min(max_wait_s, self._config.max_wait_s)
        while (admission := held.admit()) is Admission.FULL:
            now_s = self._intake.clock()
            if self._stopping.is_set():
                raise ReplayUnavailableError(STOPPING)
            if now_s >= deadline_s:
                raise DeadlineError(f"sample {held.job.capture} waited {now_s - began_s:.0f} s: {self._why_full()}")
            if now_s == began_s or now_s >= said_s + SAY_WAIT_S or now_s < said_s:
                said_s = now_s
                yield wire.InsertResponse(wait=wire.Wait(sample_id=held.job.capture, reason=self._why_full()))
            if self._over.wait(POLL_S):
                raise Gone
        held.is_committed = admission is Admission.KNOWN

    def _why_full(self) -> str:
        info = self._intake.table.info()
        room = f"{info.resident_bytes} of {info.capacity_bytes} bytes are taken"
        if not info.can_insert:
            return f"the rate limiter lets no sample in before more uses are leased ({info.num_ready_uses} are ready)"
        return (
            f"the replay buffer has no room: {room}, {info.num_ready} samples are ready, {info.num_leased} leased, "
            f"{info.num_inserting} on their way. It comes with the acks of consumers"
        )

    def _store(self, framed: FramedChunk, incoming: IncomingSample, writer: ChunkWriter) -> None:
        chunk = read_chunk(framed, incoming.job, self._signature)
        check_arrival(chunk, framed.payload, self._signature)
        index = incoming.num_chunks
        incoming.accept(chunk)
        writer.write(index, framed.payload)

    def _next_begin(self) -> Open | Begin | FramedChunk | Commit | None:
        """What comes after a sample; a service that stops waits for none."""
        deadline_s = time.monotonic() + self._config.idle_s
        while not self._stopping.is_set():
            left_s = deadline_s - time.monotonic()
            if left_s <= LOOK_S:
                return self._next(max(left_s, 0.0), "a begin")
            with contextlib.suppress(TimeoutError):
                message = self._arrivals.next(LOOK_S)
                return None if message is None else read_step(message, self._reuse)
        raise ReplayUnavailableError(STOPPING)

    def _next(self, timeout_s: float, awaited: str) -> Open | Begin | FramedChunk | Commit | None:
        try:
            message = self._arrivals.next(timeout_s)
        except TimeoutError as error:
            raise DeadlineError(f"nothing came from the producer for {timeout_s:g} s, {awaited} was due") from error
        return None if message is None else read_step(message, self._reuse)


def _name(step: Open | Begin | FramedChunk | Commit | None) -> str:
    if step is None:
        return "the end of the stream"
    names = {Open: "an open", Begin: "a begin", FramedChunk: "a chunk", Commit: "a commit"}
    return names[type(step)]


def _credit(sample_id: int, num_bytes: int) -> wire.InsertResponse:
    return wire.InsertResponse(credit=wire.Credit(sample_id=sample_id, num_bytes=num_bytes))


def _committed(sample_id: int, *, already: bool) -> wire.InsertResponse:
    return wire.InsertResponse(committed=wire.Committed(sample_id=sample_id, already=already))
