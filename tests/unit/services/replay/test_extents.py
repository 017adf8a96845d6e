"""The allocator of the arena: never two owners of a byte, never a byte lost, never out of room while there is some."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from services.replay.extents import Extent, Extents, FreeExtents, gaps, joined, pack, unpack, unpack_sample

CAPACITY_BYTES = 64


def free(*extents: tuple[int, int]) -> FreeExtents:
    found = FreeExtents()
    for extent in extents:
        found.give(Extent(*extent))
    return found


def test_lowest_extent_that_holds_all_is_taken_first() -> None:
    extents = free((0, 4), (10, 30), (40, 64))
    assert extents.take(20) == ((10, 30),)
    assert extents.take(4) == ((0, 4),)
    assert extents.free == ((40, 64),)


def test_request_that_no_extent_holds_is_made_up_of_several() -> None:
    extents = free((0, 4), (10, 20), (40, 48))
    assert extents.take(13) == ((0, 4), (10, 19))
    assert extents.free == ((19, 20), (40, 48))
    assert extents.take(10) is None
    assert extents.free_bytes == 9
    assert extents.take(0) == ()


def test_given_extents_become_one_with_their_neighbours() -> None:
    extents = free((0, 10), (20, 30))
    extents.give(Extent(10, 20))
    assert extents.free == ((0, 30),)


@pytest.mark.parametrize("again", [(0, 10), (5, 15), (2, 4), (15, 25), (19, 20)])
def test_bytes_that_are_free_cannot_be_given_again(again: tuple[int, int]) -> None:
    extents = free((0, 10), (19, 30))
    with pytest.raises(AssertionError, match="free already"):
        extents.give(Extent(*again))


def test_gaps_are_what_is_not_used() -> None:
    used = [Extent(20, 30), Extent(5, 10), Extent(10, 20)]
    assert gaps(used, 40) == ((0, 5), (30, 40))
    assert gaps([], 40) == ((0, 40),)
    assert gaps([Extent(0, 40)], 40) == ()


@pytest.mark.parametrize("wrong", [(15, 25), (9, 10), (35, 41), (8, 7)])
def test_used_extents_that_cannot_be_are_refused(wrong: tuple[int, int]) -> None:
    with pytest.raises(
        ValueError, match=f"bytes {wrong[0]} to {wrong[1]} overlap|bytes 5 to 10 overlap|bytes 20 to 30"
    ):
        gaps([Extent(5, 10), Extent(20, 30), Extent(*wrong)], 40)


@pytest.mark.parametrize("extents", [(), (Extent(0, 7),), (Extent(12, 13), Extent(0, 5))])
def test_index_keeps_extents_as_they_were(extents: Extents) -> None:
    assert unpack(pack(extents)) == extents
    assert unpack_sample(f"{pack(extents)};{pack(extents)};") == [extents, extents]


def test_joined_extents_are_the_same_bytes() -> None:
    assert joined([Extent(8, 10), Extent(0, 4), Extent(4, 8), Extent(12, 13)]) == ((0, 10), (12, 13))


class AllocatorMachine(RuleBasedStateMachine):
    """The allocator beside a list that says of each byte whose it is."""

    def __init__(self) -> None:
        super().__init__()
        self.extents = free((0, CAPACITY_BYTES))
        self.owners: list[int | None] = [None] * CAPACITY_BYTES
        self.held: dict[int, Extents] = {}
        self.next_owner = 0

    @rule(num_bytes=st.integers(0, CAPACITY_BYTES))
    def take(self, num_bytes: int) -> None:
        taken = self.extents.take(num_bytes)
        if num_bytes > self.owners.count(None):
            assert taken is None
            return
        assert taken is not None, "what is free can always be taken"
        assert sum(extent.num_bytes for extent in taken) == num_bytes
        for start, end in taken:
            assert start < end
            assert self.owners[start:end] == [None] * (end - start), "two owners of a byte"
            self.owners[start:end] = [self.next_owner] * (end - start)
        self.held[self.next_owner] = taken
        self.next_owner += 1

    @precondition(lambda self: self.held)
    @rule(pick=st.integers(0, 10**6), num_parts=st.integers(1, 3))
    def give(self, pick: int, num_parts: int) -> None:
        """Give back all of what somebody holds, or some extents of it."""
        owner = sorted(self.held)[pick % len(self.held)]
        parts = self.held.pop(owner)
        for extent in parts[:num_parts]:
            self.extents.give(extent)
            self.owners[extent.start : extent.end] = [None] * extent.num_bytes
        if parts[num_parts:]:
            self.held[owner] = parts[num_parts:]

    @invariant()
    def free_is_what_nobody_has(self) -> None:
        assert self.extents.free_bytes == self.owners.count(None)
        assert self.extents.free == gaps([extent for taken in self.held.values() for extent in taken], CAPACITY_BYTES)


AllocatorMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestAllocator = AllocatorMachine.TestCase
