"""The writer's account of an arena: which bytes are free, which are being written, and which a reader still reads.

Each byte is one of: free; claimed, by a thread that copies a chunk into it; recorded in the index as part of a sample,
or on the way there; or given up by the index and still locked by a reader, which keeps it from being claimed. Only the
index says what a sample is; this account follows it, and `rebuild` makes it anew from there.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable

from services.errors import ReplayError
from services.replay.extents import Extent, Extents, FreeExtents, gaps


class ArenaSpace:
    """Threads may share it."""

    def __init__(self, capacity_bytes: int, unread: Callable[[Extent], Extents]) -> None:
        """Nothing is free before `rebuild`.

        Args:
            capacity_bytes: Size of the arena.
            unread: Which parts of an extent no reader has locked.
        """
        self._capacity_bytes = capacity_bytes
        self._unread = unread
        self._lock = threading.Lock()
        self._free = FreeExtents()
        self._claims: set[Extents] = set()
        self._given_up: list[Extent] = []

    def rebuild(self, recorded: Iterable[Extents]) -> None:
        """Begin anew with what the index records, and what is claimed.

        Args:
            recorded: The extents of each chunk of each sample.

        Raises:
            ReplayError: Samples overlap in the index: it is not to be trusted.
        """
        with self._lock:
            used = [extent for extents in (*recorded, *self._claims) for extent in extents]
            try:
                self._given_up = list(gaps(used, self._capacity_bytes))
            except ValueError as error:
                raise ReplayError(f"the replay table's index of the shared-memory arena is spoiled: {error}") from error
            self._free = FreeExtents()
            self._settle()

    def claim(self, num_bytes: int) -> Extents | None:
        """Take bytes to write to; None if there are not so many that nobody uses or reads.

        They are the claimer's until `copied` or `give_back`, whatever becomes of the index.
        """
        with self._lock:
            self._settle()
            taken = self._free.take(num_bytes)
            if taken:
                self._claims.add(taken)
            return taken

    def copied(self, claim: Extents) -> None:
        """Nobody writes to these any more, and the index is to hear of them."""
        with self._lock:
            self._claims.discard(claim)

    def give_back(self, claim: Extents) -> None:
        """Nobody writes to these any more, and the index will not hear of them."""
        with self._lock:
            self._claims.discard(claim)
            self._given_up.extend(claim)

    def give_up(self, chunks: Iterable[Extents]) -> None:
        """The index does not have these, or not any more."""
        with self._lock:
            self._given_up.extend(extent for extents in chunks for extent in extents)

    @property
    def read_bytes(self) -> int:
        """Bytes of freed samples that living readers have locked."""
        with self._lock:
            self._settle()
            return sum(extent.num_bytes for extent in self._given_up)

    @property
    def claimed_bytes(self) -> int:
        """Bytes that captures on their way have taken."""
        with self._lock:
            return sum(extent.num_bytes for claim in self._claims for extent in claim)

    @property
    def free_bytes(self) -> int:
        """Bytes that can be claimed."""
        with self._lock:
            self._settle()
            return self._free.free_bytes

    def _settle(self) -> None:
        """Make free what the index has given up and no reader reads any more."""
        still_read: list[Extent] = []
        for extent in self._given_up:
            unread = self._unread(extent)
            for part in unread:
                self._free.give(part)
            start = extent.start
            for part in (*unread, Extent(extent.end, extent.end)):
                if part.start > start:
                    still_read.append(Extent(start, part.start))
                start = part.end
        self._given_up = still_read
