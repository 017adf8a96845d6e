"""The tables and work queues of a run as the coordinator feeds them: which are there, and which were lost.

A shard is *lost* from the moment its table is another one than was known, or did not answer: what was on its way to it
may be gone. It is *back* once its table has been emptied and named anew (`look`); what the shard held is then captured
again, which is the coordinator's to decide (`found`). None of these calls fails because a shard is away, until it has
been away for `AWAY_S`.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence

from services.contracts import CaptureJob, Outcome
from services.errors import ReplayError, ReplayUnavailableError, TableLostError
from services.replay.links import ShardLink

AWAY_S = 180.0
"""How long a Redis, or the table in it, may be away; its supervisor and the shard bring both back within seconds."""

AWAY_FACTOR = 2.0
"""A shard that took t to give no answer is left alone for so many t: the others must not wait for it each time."""


class Buffer:
    """All shards of a run.

    Args:
        links: To each; they stay the caller's.
    """

    def __init__(self, links: Sequence[ShardLink]) -> None:
        self._links = tuple(links)
        self._incarnations: list[str | None] = [link.table.incarnation() for link in self._links]
        self._lost = self._unknown()
        self._away_since_s: dict[int, float] = {}
        self._retry_s: dict[int, float] = {}

    @property
    def lost(self) -> frozenset[int]:
        """Shards that were lost, and not `found` since."""
        return frozenset(self._lost)

    @property
    def incarnations(self) -> tuple[str, ...] | None:
        """Of the tables whose samples count; None while one of them is away."""
        known = tuple(incarnation for incarnation in self._incarnations if incarnation is not None)
        return known if len(known) == len(self._links) else None

    def lose_all(self) -> None:
        """Take no table for what it was."""
        for number in range(len(self._links)):
            self._lose(number)

    def found(self) -> None:
        """What was lost, and is back, has been planned anew."""
        self._lost = self._unknown()

    def look(self, generation: int) -> list[Outcome]:
        """Notice tables that were lost, and empty those that are back.

        Args:
            generation: Of the trainer group that may lease from them.

        Returns:
            What lost tables still had to tell.

        Raises:
            ReplayUnavailableError: A Redis has been away for too long.
            TableLostError: A table has.
        """
        outcomes: list[Outcome] = []
        for link in self._links:
            with self._noticing(link) as is_asked:
                if is_asked:
                    known = self._incarnations[link.number]
                    if known is None or link.table.incarnation() != known:
                        self._lose(link.number)
                        outcomes += self._clear(link, generation)
        return outcomes

    def clear_all(self, generation: int) -> list[Outcome]:
        """Empty every table and queue.

        Returns:
            What the tables still had to tell.

        Raises:
            ReplayUnavailableError: A Redis does not answer.
            TableLostError: A table is not there; try again, its shard makes it.
        """
        self.lose_all()
        return [outcome for link in self._links for outcome in self._clear(link, generation)]

    def drain(self) -> list[Outcome]:
        """Take what became of captures, on all shards that are not lost."""
        outcomes: list[Outcome] = []
        for link in self._standing():
            with self._noticing(link):
                outcomes += link.table.drain_outcomes()
        return outcomes

    def is_known(self) -> bool:
        """Whether every table is still the one that is known; one that is not is lost from now on."""
        for link in self._standing():
            with self._noticing(link):
                if link.table.incarnation() != self._incarnations[link.number]:
                    self._lose(link.number)
        return not self._lost

    def rooms(self, most: int) -> list[int]:
        """How many more captures the work queue of each shard takes; none where it is lost.

        Args:
            most: That wait in one queue.
        """
        rooms = [0] * len(self._links)
        for link in self._standing():
            with self._noticing(link):
                rooms[link.number] = most - link.queue.size()
        return rooms

    def push(self, shard: int, job: CaptureJob) -> None:
        """Give a capture to a shard; if that is lost, the capture is among those that it had."""
        if shard not in self._lost:
            with self._noticing(self._links[shard]):
                self._links[shard].queue.push(job)

    def seal(self) -> bool:
        """Say that nothing more will come; whether every shard has heard it."""
        for link in self._standing():
            with self._noticing(link):
                link.table.seal()
        return not self._lost

    def _unknown(self) -> set[int]:
        return {number for number, incarnation in enumerate(self._incarnations) if incarnation is None}

    def _standing(self) -> list[ShardLink]:
        return [link for link in self._links if link.number not in self._lost]

    def _clear(self, link: ShardLink, generation: int) -> list[Outcome]:
        cleared = link.table.clear(generation)
        self._incarnations[link.number] = cleared.incarnation
        return cleared.outcomes

    def _lose(self, number: int) -> None:
        self._lost.add(number)
        self._incarnations[number] = None

    @contextlib.contextmanager
    def _noticing(self, link: ShardLink) -> Iterator[bool]:
        """Note a shard that does not answer as lost. Gives whether it is to be asked: not so soon after it was away."""
        began_s = time.monotonic()
        is_asked = began_s >= self._retry_s.get(link.number, began_s)
        try:
            yield is_asked
        except (ReplayUnavailableError, TableLostError) as error:
            self._lose(link.number)
            self._note_away(link.number, began_s, error)
        else:
            if is_asked:
                self._away_since_s.pop(link.number, None)

    def _note_away(self, number: int, began_s: float, error: ReplayError) -> None:
        now_s = time.monotonic()
        self._retry_s[number] = now_s + AWAY_FACTOR * (now_s - began_s)
        if now_s > self._away_since_s.setdefault(number, began_s) + AWAY_S:
            raise error
