"""Which bytes of an arena are free: extents of any length, taken from the lowest place that fits. Pure.

A request that no single free extent holds is made up of several, so for any history

    free bytes ≥ n  ⇒  take(n) succeeds,  and  free bytes + taken bytes = capacity

Fragments cost a reader one more piece to copy, and no byte is lost to them. The lowest place first keeps the part of
the arena that is in use small, and its pages mapped.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Extent(NamedTuple):
    """The bytes from `start` up to, and without, `end`."""

    start: int
    end: int

    @property
    def num_bytes(self) -> int:
        """Its length."""
        return self.end - self.start


Extents = tuple[Extent, ...]
"""What holds one chunk, in the order of its bytes."""


class FreeExtents:
    """The free bytes of an arena; none at the beginning."""

    def __init__(self) -> None:
        self._free: list[Extent] = []
        """Ascending; no two touch."""
        self._free_bytes = 0

    @property
    def free_bytes(self) -> int:
        """How many can be taken."""
        return self._free_bytes

    @property
    def free(self) -> Extents:
        """The free extents, ascending."""
        return tuple(self._free)

    def take(self, num_bytes: int) -> Extents | None:
        """Take this many bytes: the lowest extent that holds them all, else the lowest ones that do together.

        Returns:
            None if fewer are free; nothing is taken then.
        """
        assert num_bytes >= 0
        if num_bytes > self._free_bytes:
            return None
        if num_bytes == 0:
            return ()
        self._free_bytes -= num_bytes
        for place, extent in enumerate(self._free):
            if extent.num_bytes >= num_bytes:
                return (self._cut(place, num_bytes),)
        taken: list[Extent] = []
        while num_bytes:
            taken.append(self._cut(0, min(num_bytes, self._free[0].num_bytes)))
            num_bytes -= taken[-1].num_bytes
        return tuple(taken)

    def give(self, extent: Extent) -> None:
        """Make bytes free that are not; they become one with free neighbours.

        Raises:
            AssertionError: Some of them are free already.
        """
        start, end = extent
        if start == end:
            return
        place = bisect_left(self._free, extent)
        before = self._free[place - 1] if place > 0 else None
        after = self._free[place] if place < len(self._free) else None
        assert start < end, extent
        assert before is None or before.end <= start, f"{extent} is free already: {before}"
        assert after is None or end <= after.start, f"{extent} is free already: {after}"
        first, last = place, place
        if before is not None and before.end == start:
            first, start = place - 1, before.start
        if after is not None and after.start == end:
            last, end = place + 1, after.end
        self._free[first:last] = [Extent(start, end)]
        self._free_bytes += extent.num_bytes

    def _cut(self, place: int, num_bytes: int) -> Extent:
        start, end = self._free[place]
        rest = Extent(start + num_bytes, end)
        self._free[place : place + 1] = [rest] if rest.num_bytes else []
        return Extent(start, rest.start)


def gaps(used: Iterable[Extent], capacity_bytes: int) -> Extents:
    """What of an arena is not used.

    Raises:
        ValueError: Two of the used extents overlap, or one lies outside; says which.
    """
    found, end = [], 0
    for extent in sorted(used):
        if extent.start < end or extent.end > capacity_bytes or extent.start > extent.end:
            raise ValueError(f"bytes {extent.start} to {extent.end} overlap others, or end above {capacity_bytes}")
        if extent.start > end:
            found.append(Extent(end, extent.start))
        end = extent.end
    if end < capacity_bytes:
        found.append(Extent(end, capacity_bytes))
    return tuple(found)


def pack(extents: Iterable[Extent]) -> str:
    """As the index keeps the extents of one chunk: `start-end,start-end`."""
    return ",".join(f"{start}-{end}" for start, end in extents)


def unpack(text: str) -> Extents:
    """The extents of one chunk."""
    return tuple(Extent(*map(int, part.split("-"))) for part in text.split(",") if part)


def unpack_sample(text: str) -> list[Extents]:
    """The extents of each chunk of a sample; the index keeps them with a `;` behind each."""
    return [unpack(part) for part in text.split(";")[:-1]]


def joined(extents: Sequence[Extent]) -> Extents:
    """The same bytes, ascending, in as few extents as there can be."""
    found: list[Extent] = []
    for extent in sorted(extents):
        if found and found[-1].end == extent.start:
            found[-1] = Extent(found[-1].start, extent.end)
        else:
            found.append(extent)
    return tuple(found)
