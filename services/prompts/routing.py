"""Which shard a capture goes to, and which captures each shard has. Pure.

In ready order a capture goes where the fewest bytes are on their way or held: reserved, queued, or committed and not
trained yet. In deterministic mode the plan alone says it (`shard_of`), so that ranks know where to ask.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from services.replay.links import shard_of


class _Place(NamedTuple):
    shard: int
    num_bytes: int


class Router:
    """Keeps where every capture is, from its push until all of its uses are trained or it failed.

    Args:
        num_shards: Of the run.
        by_plan: Whether a capture's number alone says where it goes.
    """

    def __init__(self, num_shards: int, *, by_plan: bool) -> None:
        self._by_plan = by_plan
        self._places: dict[int, _Place] = {}
        self._num_bytes = [0] * num_shards

    def choose(self, capture: int, rooms: Sequence[int]) -> int | None:
        """Where the next capture goes; None while it has to wait for room.

        Args:
            capture: Its number.
            rooms: How many more captures the work queue of each shard takes.
        """
        if self._by_plan:
            shard = shard_of(capture, len(rooms))
            return shard if rooms[shard] > 0 else None
        open_shards = [shard for shard, room in enumerate(rooms) if room > 0]
        return min(open_shards, key=lambda shard: self._num_bytes[shard], default=None)

    def put(self, capture: int, shard: int, num_bytes: int) -> None:
        """A capture has gone to a shard."""
        self.remove(capture)
        self._places[capture] = _Place(shard, num_bytes)
        self._num_bytes[shard] += num_bytes

    def resize(self, capture: int, num_bytes: int) -> None:
        """A capture has come to so many bytes; one that is nowhere is passed over."""
        place = self._places.get(capture)
        if place is not None:
            self.put(capture, place.shard, num_bytes)

    def remove(self, capture: int) -> None:
        """A capture is done with, or failed. Again: nothing happens."""
        place = self._places.pop(capture, None)
        if place is not None:
            self._num_bytes[place.shard] -= place.num_bytes

    def on(self, shard: int) -> list[int]:
        """The captures of a shard, ascending."""
        return sorted(capture for capture, place in self._places.items() if place.shard == shard)

    def num_bytes(self, shard: int) -> int:
        """Bytes that its captures take or will take."""
        return self._num_bytes[shard]
