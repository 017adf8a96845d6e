"""The metric stream: small records that anyone may read and nobody waits for.

A writer hands records to a thread through a bounded queue; what does not fit, or cannot be sent, is dropped and
counted. The stream in Redis keeps the newest records. The driver reads it and hands every record to its `Journal`:
one sink keeps the run's history in its output directory, others turn it into other views.

| kind | when | fields |
|---|---|---|
| `run` | an attempt starts | `run_id`, `name`, `attempt`, `resumed_from_step`, `target`, `algorithm`, `block_size`, `reuse`, `total_steps`, `command`, `host`, `pid` |
| `step` | an optimizer step is done | `step`, `total_steps`, `metrics`, `learning_rate`, `samples`, `tokens`, `tokens_per_s`, `wait_s`, `step_s`, `wait_fraction` |
| `figures` | about once a second | `phase`, `step`, `tokens_captured`, `tokens_trained`, `capture_tokens_per_s`, `resident_bytes`, `shard_bytes` (those of each shard), `peak_bytes`, `capacity_bytes`, `targets`, `autoscaling` |
| `event` | a restart, a skip, a scaling | `event` (its kind), `message` |
| `evaluation` | a checkpoint was decoded with | `label`, `step`, `began_s`, `num_samples`, `accepted_length`, `interval`, `accept_rate`, `cond_accept_rate`, `domains` (by name `num_samples`, `accepted_length`, `interval`, `accept_rate`), `lossless` |
| `end` | an attempt ends in order | `outcome` (`finished`, `stopped`, `failed`), `message` |

Each also has `kind` and `time_s` (wall clock). A resumed run appends to the history of the attempt before.
"""  # noqa: E501

from __future__ import annotations

import json
import os
import queue
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol, Self

import redis

from services.errors import ReplayError

MOST_RECORDS = 10_000
"""Records that the stream keeps, about."""

QUEUE_RECORDS = 1_000
"""Records that may wait in a process."""

CLOSE_TIMEOUT_S = 20.0
"""How long a process that ends still sends what is queued; on a busy machine that takes seconds."""

BLOCK_MS_LIMIT = 5_000
"""Longest blocking read; the connection's own time-out must not pass first."""

FIELD = b"record"

RunOutcome = Literal["finished", "stopped", "failed"]
"""How an attempt ended, in its `end` record."""


class Sink(Protocol):
    """Takes the records of a run, in the driver's thread: what is slow or can fail belongs in a thread of its own."""

    def take(self, record: dict[str, Any]) -> None:
        """One record, with `kind` and `time_s`; read it, do not change it."""
        ...

    def close(self) -> None:
        """No record follows."""
        ...


class HistoryFile:
    """The sink that keeps a run's history: JSON lines, each written whole as it comes.

    Args:
        path: The file; what earlier attempts wrote stays. A line that a killed attempt left half-written is ended, so
            that it costs a reader that line alone.
    """

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        size = os.fstat(self._file).st_size
        if size and os.pread(self._file, 1, size - 1) != b"\n":
            os.write(self._file, b"\n")

    def take(self, record: dict[str, Any]) -> None:
        """Append a record."""
        os.write(self._file, json.dumps(record, separators=(",", ":")).encode() + b"\n")

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)


class Journal:
    """Hands every record of a run to all sinks, in order."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._sinks = list(sinks)

    def take(self, record: dict[str, Any]) -> None:
        """One record, as it is."""
        for sink in self._sinks:
            sink.take(record)

    def write(self, kind: str, *, time_s: float | None = None, **fields: Any) -> None:
        """Make a record and hand it on.

        Args:
            kind: See the module's table.
            time_s: Wall clock; now by default.
            **fields: What JSON can hold.
        """
        self.take({"kind": kind, "time_s": time.time() if time_s is None else time_s, **fields})

    def close(self) -> None:
        """Close every sink. Again: nothing happens."""
        while self._sinks:
            self._sinks.pop(0).close()


class TelemetryWriter:
    """Sends records from one process. `emit` never blocks and never raises for Redis' sake."""

    def __init__(self, client: redis.Redis, prefix: str) -> None:
        """Start the sending thread.

        Args:
            client: The control Redis.
            prefix: Of the run's keys.
        """
        self._client = client
        self._key = f"{prefix}:telemetry"
        self._queue: queue.Queue[str | None] = queue.Queue(QUEUE_RECORDS)
        self._lock = threading.Lock()
        self._num_dropped = 0
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._send_all, name="telemetry", daemon=True)
        self._thread.start()

    @property
    def num_dropped(self) -> int:
        """Records lost because the queue was full or Redis did not take them."""
        with self._lock:
            return self._num_dropped

    def emit(self, kind: str, **fields: Any) -> None:
        """Queue one record.

        Args:
            kind: What it is: `step`, `event`, …
            **fields: Numbers, strings, lists and dicts of these. `time_s` is added unless given.

        Raises:
            TypeError: A field is nothing that JSON can hold.
        """
        text = json.dumps({"kind": kind, "time_s": time.time(), **fields}, separators=(",", ":"))
        if self._closed.is_set():
            self._drop()
            return
        try:
            self._queue.put_nowait(text)
        except queue.Full:
            self._drop()

    def close(self) -> None:
        """Send what is queued, for at most `CLOSE_TIMEOUT_S`, and end the thread. Again: nothing happens."""
        if self._closed.is_set():
            return
        self._closed.set()
        try:
            self._queue.put(None, timeout=CLOSE_TIMEOUT_S)
        except queue.Full:
            return  # the thread hangs on Redis; it is a daemon
        self._thread.join(CLOSE_TIMEOUT_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _send_all(self) -> None:
        while (text := self._queue.get()) is not None:
            try:
                self._client.xadd(self._key, {FIELD: text}, maxlen=MOST_RECORDS, approximate=True)
            except ReplayError:  # Redis is away or full: telemetry is what can be lost
                self._drop()

    def _drop(self) -> None:
        with self._lock:
            self._num_dropped += 1


class TelemetryReader:
    """Reads a run's records from the oldest that the stream still has."""

    def __init__(self, client: redis.Redis, prefix: str) -> None:
        """Begin at the start of the stream under `prefix`."""
        self._client = client
        self._key = f"{prefix}:telemetry"
        self._last_id: bytes | str = "0"

    def read(self, block_ms: int = 0, count: int = 1_000) -> list[dict[str, Any]]:
        """The next records, oldest first.

        Args:
            block_ms: How long to wait for one if there is none, at most five seconds; 0 does not wait.
            count: Most records of one call.

        Returns:
            Each with `kind`, `time_s` and its own fields; empty if there are none.

        Raises:
            ReplayUnavailableError: Redis does not answer.
        """
        block = min(block_ms, BLOCK_MS_LIMIT) if block_ms > 0 else None
        answer: Any = self._client.xread({self._key: self._last_id}, count=count, block=block)
        if not answer:
            return []
        ((_, entries),) = answer
        self._last_id = entries[-1][0]
        return [json.loads(fields[FIELD]) for _, fields in entries]
