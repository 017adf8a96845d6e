"""Memory that is used again: which buffer a capture gets, and how much is kept."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from services.target.buffers import LARGEST_WASTE, SMALLEST_BYTES, STEPS_PER_DOUBLING, BufferPool, rounded_up

MIB = 1024**2


class Allocations:
    """Makes memory, and remembers the sizes."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def __call__(self, size: int) -> Tensor:
        self.sizes.append(size)
        return torch.empty(size, dtype=torch.uint8)


@pytest.fixture
def made() -> Allocations:
    return Allocations()


def test_released_buffer_is_used_again(made: Allocations) -> None:
    pool = BufferPool(allocate=made)
    first = pool.take(MIB)
    place = first.bytes_N.data_ptr()
    assert first.bytes_N.nbytes == MIB
    first.release()
    assert pool.take(MIB - 5).bytes_N.data_ptr() == place
    assert made.sizes == [MIB]


def test_buffer_in_use_is_given_to_nobody_else(made: Allocations) -> None:
    pool = BufferPool(allocate=made)
    buffers = [pool.take(MIB) for _ in range(3)]
    assert len({buffer.bytes_N.data_ptr() for buffer in buffers}) == 3
    assert pool.unused_bytes == 0


def test_second_release_does_nothing() -> None:
    pool = BufferPool()
    buffer = pool.take(MIB)
    buffer.release()
    buffer.release()
    assert pool.unused_bytes == MIB
    assert pool.take(MIB).bytes_N.data_ptr() != pool.take(MIB).bytes_N.data_ptr()


def test_smallest_that_fits_is_taken_and_none_that_wastes_too_much(made: Allocations) -> None:
    pool = BufferPool(allocate=made)
    buffers = [pool.take(size * MIB) for size in (8, 2, 3)]
    for buffer in buffers:
        buffer.release()
    assert pool.take(2 * MIB).bytes_N.data_ptr() == buffers[1].bytes_N.data_ptr()
    assert pool.take(2 * MIB).bytes_N.data_ptr() == buffers[2].bytes_N.data_ptr()
    assert made.sizes == [8 * MIB, 2 * MIB, 3 * MIB]
    pool.take(2 * MIB)  # 8 MiB are more than twice that
    assert made.sizes == [8 * MIB, 2 * MIB, 3 * MIB, 2 * MIB]


def test_pool_keeps_no_more_than_its_bound_and_drops_what_was_unused_longest(made: Allocations) -> None:
    pool = BufferPool(4 * MIB, allocate=made)
    sizes = [MIB, 2 * MIB, 2 * MIB]
    for buffer in [pool.take(size) for size in sizes]:
        buffer.release()
    assert pool.unused_bytes == 4 * MIB
    in_use = [pool.take(size) for size in (2 * MIB, 2 * MIB, MIB)]
    assert len(in_use) == 3
    assert made.sizes == [*sizes, MIB]


def test_dropped_buffer_is_not_kept() -> None:
    pool = BufferPool()
    pool.take(MIB)
    assert pool.unused_bytes == 0


@given(st.integers(1, 2**40))
def test_rounding_wastes_an_eighth_at_most(num_bytes: int) -> None:
    size = rounded_up(num_bytes)
    assert num_bytes <= size <= max(SMALLEST_BYTES, num_bytes * (1 + 1 / STEPS_PER_DOUBLING))
    assert rounded_up(size) == size
    assert LARGEST_WASTE * num_bytes >= size or size == SMALLEST_BYTES


def test_sizes_of_samples_of_nearly_one_length_are_the_same() -> None:
    assert len({rounded_up(tokens * 30_720) for tokens in range(1000, 1020)}) <= 2
