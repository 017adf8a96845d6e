"""Which samples were committed lately, also those that are used up: a repeat of one must not be inserted again.

The table's list of outcomes tells it: each commit appends to it in the same transition, so no death leaves one out.
Nobody drains the list of a table that a service keeps; it is cut to its newest entries here.
"""

from __future__ import annotations

import threading
from typing import Any, NamedTuple

import redis

from services.contracts import CaptureJob, Outcome, Sample, TableSignature
from services.errors import ReplayError
from services.replay.keys import outcomes_key, sample_key, table_key
from services.replay.rules import ALREADY_RESIDENT

REMEMBERED = 20_000
"""Outcomes kept, a few MB in Redis: far more than the samples that a producer may not know the fate of."""


class _Committed(NamedTuple):
    attempt: int
    num_tokens: int
    num_bytes: int


class RecentCommits:
    """The commits among a table's newest outcomes. Threads may share it."""

    def __init__(self, client: redis.Redis, prefix: str, remembered: int = REMEMBERED) -> None:
        self._client = client
        self._prefix = prefix
        self._key = outcomes_key(prefix)
        self._remembered = remembered
        self._lock = threading.Lock()
        self._incarnation: Any = None
        self._length = 0
        """Entries of the list that were read; it grows at its other end."""
        self._committed: dict[int, _Committed] = {}

    def has(self, job: CaptureJob, signature: TableSignature) -> bool:
        """Whether a sample was committed before.

        Raises:
            ReplayError: A different one was, under the same id.
        """
        known = self._find(job.capture)
        if known is None:
            return False
        record: Any = self._client.hget(sample_key(self._prefix, job.capture), "record")
        if record is not None:
            held = Sample.model_validate_json(record).job
            is_same = _content(held) == _content(job)
        else:  # it is used up, and only its size is remembered
            is_same = known[1:] == (job.num_tokens, signature.reserved_bytes(job))
        if not is_same:
            raise ReplayError(
                f"sample id {job.capture} was taken by another sample, with {known.num_tokens} tokens and "
                f"{known.num_bytes} bytes: give each sample an id of its own, also across producers"
            )
        return True

    def trim(self) -> None:
        """Forget the oldest, in Redis and here."""
        with self._lock:
            self._refresh()
            if self._length > self._remembered:
                self._client.ltrim(self._key, self._length - self._remembered, -1)
                self._read_all()

    def _find(self, capture: int) -> _Committed | None:
        with self._lock:
            self._refresh()
            return self._committed.get(capture)

    def _refresh(self) -> None:
        incarnation: Any = self._client.hget(table_key(self._prefix), "incarnation")
        if incarnation != self._incarnation:  # all that the table before held is lost
            self._incarnation = incarnation
            self._read_all()
            return
        entries: list[Any] = self._client.lrange(self._key, self._length, -1)
        self._note(entries)
        self._length += len(entries)

    def _read_all(self) -> None:
        self._committed.clear()
        entries: list[Any] = self._client.lrange(self._key, 0, -1)
        self._note(entries)
        self._length = len(entries)

    def _note(self, entries: list[Any]) -> None:
        for text in entries:
            outcome = Outcome.model_validate_json(text)
            known = self._committed.get(outcome.capture)
            if outcome.reason == ALREADY_RESIDENT:
                continue
            if outcome.kind == "committed":
                self._committed[outcome.capture] = _Committed(outcome.attempt, outcome.num_tokens, outcome.num_bytes)
            elif known is not None and known.attempt == outcome.attempt:
                del self._committed[outcome.capture]  # freed unused: it may come again


def _content(job: CaptureJob) -> CaptureJob:
    return job.model_copy(update={"attempt": 0, "ks": None})
