"""The rate limiter at work in every table, and that no way of filling one ends in waiting for ever."""

from __future__ import annotations

import math

import pytest
from replaying import JOB_BYTES, SIGNATURE, MakeReplay, bytes_of, captures_of, failed, insert, lease, make_job, store

from services.contracts import SampleLease
from services.errors import ReplayError, SampleTooLargeError
from services.replay.protocol import ReplayTable
from services.replay.rate_limiter import RateLimiter
from services.replay.rules import Admission

PLENTY_BYTES = 1000 * JOB_BYTES


def limited(
    make_replay: MakeReplay, limiter: RateLimiter, *, capacity_bytes: int = PLENTY_BYTES, reuse: int = 1
) -> ReplayTable:
    table = make_replay().table
    table.create(capacity_bytes, SIGNATURE, reuse, limiter)
    return table


def admit(table: ReplayTable, capture: int, *, reuse: int = 1, tokens: int = 3) -> Admission:
    job = make_job(capture, reuse=reuse, tokens=tokens)
    return table.admit(job, bytes_of(job), 0.0)


# The law.


def test_nothing_is_leased_before_min_size(make_replay: MakeReplay) -> None:
    table = limited(make_replay, RateLimiter(min_size=3))
    for capture in range(2):
        insert(table, make_job(capture))
        assert lease(table) == []
        assert not table.info().can_sample
    insert(table, make_job(2))
    assert table.info().can_sample
    assert captures_of(lease(table)) == [0]


def test_captures_in_flight_do_not_make_up_min_size(make_replay: MakeReplay) -> None:
    table = limited(make_replay, RateLimiter(min_size=2))
    insert(table, make_job(0))
    admit(table, 1)
    assert lease(table) == []


def test_inserting_waits_for_sampling_at_max_diff(make_replay: MakeReplay) -> None:
    table = limited(make_replay, RateLimiter.with_error_buffer(1, 1, 2))  # −1 … 3
    for capture in range(2):
        insert(table, make_job(capture))
    assert admit(table, 2) is Admission.ADMITTED  # the third, in flight
    assert (table.info().difference, table.info().can_insert) == (3, False)
    assert admit(table, 3) is Admission.FULL
    assert table.info().wanted_bytes == 0, "it is not bytes that it waits for"
    lease(table)
    assert admit(table, 3) is Admission.ADMITTED


def test_sampling_waits_for_inserting_at_min_diff(make_replay: MakeReplay) -> None:
    table = limited(make_replay, RateLimiter.with_error_buffer(2, 1, 1), reuse=3)  # 1 … 3, one of three uses expected
    for capture in range(2):
        insert(table, make_job(capture, reuse=3))
    assert len(lease(table)) == 1  # 2 − 1 ≥ 1
    assert lease(table) == []
    insert(table, make_job(2, reuse=3))
    assert len(lease(table)) == 1


def test_use_that_comes_back_counts_as_not_sampled(make_replay: MakeReplay) -> None:
    table = limited(make_replay, RateLimiter.with_error_buffer(2, 1, 1), reuse=3)
    for capture in range(2):
        insert(table, make_job(capture, reuse=3))
    held = lease(table)
    assert lease(table) == []
    table.release(held, 0)
    held = lease(table)
    assert len(held) == 1
    table.expire(1e9)
    assert len(lease(table)) == 1


def test_samples_that_leave_do_not_shift_the_law(make_replay: MakeReplay) -> None:
    """Samples that feed one use of two would let Reverb's difference grow by one each, until nothing is inserted."""
    table = limited(make_replay, RateLimiter.with_error_buffer(1, 2, 4), reuse=2)
    for capture in range(50):
        insert(table, make_job(capture, reuse=2, ks=(1,)))
        table.ack(lease(table), 0, 0.0)
    assert table.info().difference == 0


def test_new_generation_does_not_shift_the_law(make_replay: MakeReplay) -> None:
    table = limited(make_replay, RateLimiter.with_error_buffer(1, 2, 4), reuse=2)
    for generation in range(1, 20):
        insert(table, make_job(generation, reuse=2))
        table.ack(lease(table, generation=generation - 1), generation - 1, 0.0)
        table.set_generation(generation)
    assert (table.info().difference, table.info().num_ready_uses) == (0, 0)


def test_takeover_is_not_held_up_by_the_limiter(make_replay: MakeReplay) -> None:
    table = limited(make_replay, RateLimiter.with_error_buffer(1, 1, 1))
    assert [admit(table, capture) for capture in range(3)] == ["ADMITTED", "ADMITTED", "FULL"]
    job = make_job(0, attempt=1)
    assert table.admit(job, bytes_of(job), 0.0) is Admission.ADMITTED
    assert table.info().num_inserting == 2


def test_takeover_is_not_held_up_by_tighter_limits(make_replay: MakeReplay) -> None:
    table = limited(make_replay, RateLimiter())
    assert [admit(table, capture) for capture in range(4)] == ["ADMITTED"] * 4
    table.create(PLENTY_BYTES, SIGNATURE, 1, RateLimiter.with_error_buffer(1, 1, 1))
    job = make_job(0, attempt=1)
    assert table.admit(job, bytes_of(job), 0.0) is Admission.ADMITTED
    assert admit(table, 4) is Admission.FULL


def test_nothing_is_inserted_beyond_min_size_where_the_bounds_end_there(make_replay: MakeReplay) -> None:
    table = limited(make_replay, RateLimiter(min_size=2, samples_per_insert=1, min_diff=0, max_diff=2))
    assert [admit(table, capture) for capture in range(3)] == ["ADMITTED", "ADMITTED", "FULL"]


def test_abandoned_capture_gives_its_promise_back(make_replay: MakeReplay) -> None:
    table = limited(make_replay, RateLimiter.with_error_buffer(1, 1, 1))
    assert [admit(table, capture) for capture in range(3)] == ["ADMITTED", "ADMITTED", "FULL"]
    assert table.abandon(make_job(1), failed(make_job(1)))
    assert admit(table, 2) is Admission.ADMITTED


def test_lease_that_the_limiter_might_never_allow_is_refused(make_replay: MakeReplay) -> None:
    table = limited(make_replay, RateLimiter.with_error_buffer(2, 1, 3))  # −1 … 5
    with pytest.raises(ReplayError, match=r"a lease of 6 uses is more than the 5 .* replay.error_buffer"):
        lease(table, 6)
    assert lease(table, 5) == []
    table.seal()
    assert lease(table, 6) == []


def test_named_captures_do_not_ask_the_limiter(make_replay: MakeReplay) -> None:
    table = limited(make_replay, RateLimiter(min_size=3))
    insert(table, make_job(4))
    assert lease(table) == []
    assert captures_of(lease(table, captures=[4])) == [4]


def test_limits_change_when_the_table_is_created_again(make_replay: MakeReplay) -> None:
    table = limited(make_replay, RateLimiter(min_size=3))
    insert(table, make_job(0))
    assert lease(table) == []
    table.create(PLENTY_BYTES, SIGNATURE, 1, RateLimiter(min_size=1))
    assert captures_of(lease(table)) == [0]


def test_info_says_what_the_limiter_sees(make_replay: MakeReplay) -> None:
    table = limited(make_replay, RateLimiter.with_error_buffer(2, 2, 5), capacity_bytes=3 * JOB_BYTES, reuse=3)
    info = table.info()
    assert (info.min_size, info.samples_per_insert, info.min_diff, info.max_diff) == (2, 2, -1, 9)
    assert (info.max_times_sampled, info.generation, info.selector) == (3, 0, "fifo")
    assert (info.can_insert, info.can_sample, info.difference) == (True, False, 0)
    for capture in range(2):
        insert(table, make_job(capture, reuse=3))
    admit(table, 2, reuse=3)
    assert admit(table, 3, reuse=3, tokens=4) is Admission.FULL
    lease(table)
    info = table.info()
    assert (info.difference, info.num_ready, info.num_ready_uses, info.num_leased) == (5, 2, 5, 1)
    assert (info.inserts, info.samples, info.deletes, info.num_inserting) == (2, 1, 0, 1)
    assert (info.resident_bytes, info.wanted_bytes) == (3 * JOB_BYTES, JOB_BYTES + 16)
    assert (info.can_insert, info.can_sample) == (True, True)
    unbounded = limited(make_replay, RateLimiter()).info()
    assert (unbounded.min_diff, unbounded.max_diff) == (None, None)
    assert RateLimiter().max_diff == math.inf


# No deadlock.


def drain(table: ReplayTable, count: int) -> list[list[int]]:
    """Lease and ack until nothing comes; the captures of each lease."""
    got: list[list[int]] = []
    while leases := lease(table, count):
        got.append(captures_of(leases))
        table.ack(leases, 0, 0.0)
    return got


def test_tail_shorter_than_min_size_is_trained_once_sealed(make_replay: MakeReplay) -> None:
    table = limited(make_replay, RateLimiter.with_error_buffer(10, 1, 4))
    for capture in range(3):
        insert(table, make_job(capture))
    assert lease(table) == []
    table.seal()
    assert drain(table, 2) == [[0, 1], [2]]
    assert table.info().resident_bytes == 0


def test_last_samples_below_min_size_are_trained_once_sealed(make_replay: MakeReplay) -> None:
    table = limited(make_replay, RateLimiter(min_size=4))
    for capture in range(6):
        insert(table, make_job(capture))
    assert drain(table, 1) == [[0], [1], [2]]
    table.seal()
    assert drain(table, 1) == [[3], [4], [5]]


def test_tail_shorter_than_the_world_gives_some_ranks_nothing(make_replay: MakeReplay) -> None:
    table = limited(make_replay, RateLimiter())
    for capture in range(3):
        insert(table, make_job(capture))
    table.seal()
    held: list[list[SampleLease]] = []
    for rank in range(4):  # all ranks lease before any of them can ack: the step is one collective
        held.append(table.lease(rank=rank, generation=0, count=2, now_s=0.0, lease_s=10.0))
    assert [captures_of(leases) for leases in held] == [[0, 1], [2], [], []]
    info = table.info()
    assert (info.sealed, info.num_ready) == (True, 0), "what tells a rank that nothing more will come"
    for leases in held:
        table.ack(leases, 0, 0.0)
    assert table.info().resident_bytes == 0


@pytest.mark.parametrize("limiter", [RateLimiter(min_size=10), RateLimiter.with_error_buffer(10, 1, 4)])
def test_full_bytes_with_min_size_unmet_are_sampled(make_replay: MakeReplay, limiter: RateLimiter) -> None:
    table = limited(make_replay, limiter, capacity_bytes=4 * JOB_BYTES)
    trained: list[int] = []
    next_capture = 0
    for _ in range(40):
        if next_capture < 20 and admit(table, next_capture) is Admission.ADMITTED:
            table.commit(store(table, make_job(next_capture)), 0.0)
            next_capture += 1
            continue
        if next_capture == 20:
            table.seal()
        leases = lease(table, 2)
        assert leases, f"nothing moves after {trained}"
        table.ack(leases, 0, 0.0)
        trained += captures_of(leases)
        if len(trained) == 20:
            break
    assert trained == list(range(20))


def test_min_size_blocks_again_once_there_is_room(make_replay: MakeReplay) -> None:
    table = limited(make_replay, RateLimiter(min_size=3), capacity_bytes=2 * JOB_BYTES)
    for capture in range(2):
        insert(table, make_job(capture))
    assert lease(table) == [], "nobody has been refused for bytes"
    assert admit(table, 2) is Admission.FULL
    table.ack(lease(table), 0, 0.0)
    assert lease(table) == [], "what was refused fits now"
    assert admit(table, 2) is Admission.ADMITTED


def test_one_huge_sample_fills_the_table_and_is_used(make_replay: MakeReplay) -> None:
    job = make_job(0, tokens=10)
    table = limited(make_replay, RateLimiter(min_size=5), capacity_bytes=bytes_of(job))
    insert(table, job)
    assert lease(table, 2) == [], "another may still fit, for all the table knows"
    assert admit(table, 1) is Admission.FULL
    leases = lease(table, 2)
    assert captures_of(leases) == [0], "no ack would ever make room for a second"
    assert admit(table, 1) is Admission.FULL
    table.ack(leases, 0, 0.0)
    assert admit(table, 1) is Admission.ADMITTED
    with pytest.raises(SampleTooLargeError):
        admit(table, 2, tokens=11)


def test_huge_sample_behind_small_ones_gets_its_turn(make_replay: MakeReplay) -> None:
    huge = make_job(9, tokens=10)
    table = limited(make_replay, RateLimiter(), capacity_bytes=bytes_of(huge))
    for capture in range(3):
        insert(table, make_job(capture))
    assert table.admit(huge, bytes_of(huge), 0.0) is Admission.FULL
    leases = lease(table, 2)
    assert captures_of(leases) == [0, 1]
    assert lease(table, 2) == [], "an ack of what is leased may still bring more"
    table.ack(leases, 0, 0.0)
    assert table.admit(huge, bytes_of(huge), 0.0) is Admission.FULL
    leases = lease(table, 2)
    assert captures_of(leases) == [2], "nothing is leased, and what comes next does not fit beside it"
    table.ack(leases, 0, 0.0)
    assert table.admit(huge, bytes_of(huge), 0.0) is Admission.ADMITTED


def test_full_table_waits_for_what_is_leased_or_on_its_way(make_replay: MakeReplay) -> None:
    """Micro-batches stay full while acks or commits can still bring what is missing."""
    table = limited(make_replay, RateLimiter(), capacity_bytes=3 * JOB_BYTES)
    insert(table, make_job(0))
    for capture in (1, 2):
        assert admit(table, capture) is Admission.ADMITTED
    assert admit(table, 3) is Admission.FULL
    assert lease(table, 2) == []
    for capture in (1, 2):
        table.commit(store(table, make_job(capture)), 0.0)
    leases = lease(table, 2)
    assert captures_of(leases) == [0, 1]
    assert lease(table, 2) == []
    table.ack(leases, 0, 0.0)
    insert(table, make_job(3))
    assert captures_of(lease(table, 2)) == [2, 3]
