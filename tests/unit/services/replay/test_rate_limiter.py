"""The rate limiter's law in numbers, what it refuses, and that nothing it accepts comes to a stand."""

from __future__ import annotations

import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from services.replay.rate_limiter import LimiterState, RateLimiter

LIMITER = RateLimiter.with_error_buffer(min_size=4, samples_per_insert=2, error_buffer=6)
"""min_diff 2, max_diff 14."""


def test_without_limits_everything_goes() -> None:
    limiter = RateLimiter()
    assert limiter.can_insert(LimiterState(size=10**6, promised=10**6, sampled=0), 1)
    assert limiter.can_sample(LimiterState(size=1, promised=1, sampled=1), 10**6)
    assert limiter.largest_lease == math.inf


def test_error_buffer_lies_to_both_sides_of_the_ratio() -> None:
    assert (LIMITER.min_diff, LIMITER.max_diff) == (2, 14)
    assert RateLimiter.with_error_buffer(4, 2, None) == RateLimiter(4, 2)


@pytest.mark.parametrize(
    ("state", "answer"),
    [
        (LimiterState(size=6, promised=12, sampled=0), True),  # 12 + 2 ≤ 14
        (LimiterState(size=7, promised=14, sampled=1), False),  # 13 + 2 > 14
        (LimiterState(size=7, promised=14, sampled=2), True),
        (LimiterState(size=5, promised=10, sampled=0, num_inserting=1, promising=2), True),
        (LimiterState(size=5, promised=10, sampled=0, num_inserting=2, promising=4), False),
    ],
)
def test_insert_is_allowed_up_to_max_diff(state: LimiterState, answer: bool) -> None:
    assert LIMITER.can_insert(state, 2) is answer


def test_insert_up_to_min_size_is_always_allowed() -> None:
    limiter = RateLimiter(4, 2, 0, 8)
    assert limiter.can_insert(LimiterState(size=2, promised=20, sampled=0, num_inserting=1, promising=2), 2)
    assert not limiter.can_insert(LimiterState(size=2, promised=20, sampled=0, num_inserting=2, promising=2), 2)


@pytest.mark.parametrize(
    ("state", "num_uses", "answer"),
    [
        (LimiterState(size=3, promised=6, sampled=0), 1, False),
        (LimiterState(size=4, promised=8, sampled=0), 6, True),  # 8 − 6 ≥ 2
        (LimiterState(size=4, promised=8, sampled=0), 7, False),
        (LimiterState(size=4, promised=8, sampled=6), 1, False),
        (LimiterState(size=3, promised=6, sampled=0, is_sealed=True), 6, True),
        (LimiterState(size=3, promised=6, sampled=0, is_full=True), 6, True),
    ],
)
def test_sample_needs_min_size_and_min_diff_unless_nothing_more_can_come(
    state: LimiterState, num_uses: int, answer: bool
) -> None:
    assert LIMITER.can_sample(state, num_uses) is answer


def test_sample_that_feeds_few_uses_promises_no_more() -> None:
    assert [LIMITER.promise(num_uses) for num_uses in (1, 2, 3)] == [1, 2, 2]


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ((4, 2, 0, 7), r"max_diff 7 is below samples_per_insert 2 × min_size 4 = 8: inserting would stop"),
        ((4, 2, 9, 20), r"min_diff 9 is above samples_per_insert 2 × min_size 4 = 8: min_size samples"),
        ((4, 3, 12, 14), r"max_diff 14 and min_diff 12 are less than samples_per_insert 3 apart"),
        ((0, 1, 0, 9), "min_size 0 and samples_per_insert 1 must be at least 1"),
    ],
)
def test_limits_that_come_to_a_stand_are_refused(limits: tuple[int, int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RateLimiter(*limits)


def test_error_buffer_below_one_sample_is_refused() -> None:
    with pytest.raises(ValueError, match="error_buffer 1 is below samples_per_insert 2"):
        RateLimiter.with_error_buffer(4, 2, 1)


LIMITERS = st.builds(
    lambda min_size, spi, more: RateLimiter.with_error_buffer(min_size, spi, spi + more),
    min_size=st.integers(1, 12),
    spi=st.integers(1, 4),
    more=st.integers(0, 6),
)


@given(
    limiter=LIMITERS,
    samples=st.lists(st.tuples(st.integers(1, 6), st.integers(0, 5)), max_size=30),
    count=st.integers(1, 40),
)
def test_nothing_waits_for_ever_whatever_is_in_the_table(
    limiter: RateLimiter, samples: list[tuple[int, int]], count: int
) -> None:
    """With nothing in flight and bytes left, an insert is allowed, or a lease is allowed and its uses are there."""
    assume(count <= limiter.largest_lease)
    held = [(uses, min(taken, uses)) for uses, taken in samples]  # all leased and not acked stays, too
    state = LimiterState(
        size=len(held),
        promised=sum(limiter.promise(uses) for uses, _ in held),
        sampled=sum(taken for _, taken in held),
    )
    num_ready = sum(uses - taken for uses, taken in held)
    can_lease = num_ready >= count and limiter.can_sample(state, count)
    assert can_lease or limiter.can_insert(state, limiter.samples_per_insert)


@given(limiter=LIMITERS)
def test_largest_lease_is_the_largest_that_is_safe(limiter: RateLimiter) -> None:
    """One use more, and a table filled to where inserting stops cannot give it."""
    promised = 0
    size = 0
    while limiter.can_insert(LimiterState(size=size, promised=promised, sampled=0), limiter.samples_per_insert):
        size, promised = size + 1, promised + limiter.samples_per_insert
    least = int(limiter.max_diff) - limiter.samples_per_insert + 1
    assert promised >= least
    at_worst = LimiterState(size=max(size, limiter.min_size), promised=least, sampled=0)
    assert limiter.can_sample(at_worst, int(limiter.largest_lease))
    more = int(limiter.largest_lease) + 1
    assert more > least or not limiter.can_sample(at_worst, more)
