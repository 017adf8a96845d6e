"""Memory that is used again: which buffer is given to whom, when it may be written again, and how much is kept."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from services.buffers import ALIGNMENT, LEAST_BYTES, STEPS_PER_DOUBLING, Buffer, BufferPool, rounded_up

MIB = 2**20


class Allocations:
    """Makes memory, and remembers the sizes."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def __call__(self, size: int) -> Tensor:
        self.sizes.append(size)
        return torch.empty(size, dtype=torch.uint8)


class Copy:
    """A copy to a device that is done when it is told so, or waited for."""

    def __init__(self) -> None:
        self.is_done = False

    def query(self) -> bool:
        return self.is_done

    def synchronize(self) -> None:
        self.is_done = True


@pytest.fixture
def made() -> Allocations:
    return Allocations()


@pytest.fixture
def pool(made: Allocations) -> BufferPool:
    return BufferPool(allocate=made)


def place_of(buffer: Buffer) -> int:
    return buffer.bytes_N.data_ptr()


def test_tensors_of_a_buffer_are_aligned_and_apart(pool: BufferPool) -> None:
    buffer = pool.take(1000)
    first, second = buffer.cut(1, 3, dtype=torch.bfloat16), buffer.cut(2, 2, dtype=torch.float32)
    assert (first.shape, second.shape) == ((1, 3), (2, 2))
    assert second.data_ptr() - first.data_ptr() == ALIGNMENT
    first.fill_(1)
    second.fill_(2)
    assert first.tolist() == [[1, 1, 1]]


def test_more_than_was_taken_is_not_cut(pool: BufferPool) -> None:
    with pytest.raises(AssertionError, match="taken for less"):
        pool.take(100).cut(101, dtype=torch.uint8)


def test_released_memory_is_used_again_from_its_beginning(pool: BufferPool, made: Allocations) -> None:
    first = pool.take(MIB)
    first.cut(MIB, dtype=torch.uint8)
    first.release()
    again = pool.take(MIB - 5)
    assert place_of(again) == place_of(first)
    again.cut(MIB - 5, dtype=torch.uint8)
    assert made.sizes == [MIB]


def test_memory_in_use_is_given_to_nobody_else(pool: BufferPool) -> None:
    assert len({place_of(buffer) for buffer in [pool.take(MIB) for _ in range(3)]}) == 3


def test_second_release_does_nothing(pool: BufferPool) -> None:
    buffer = pool.take(MIB)
    buffer.release()
    buffer.release()
    first, second = pool.take(MIB), pool.take(MIB)
    assert place_of(first) != place_of(second)


def test_dropped_buffer_is_as_good_as_released(pool: BufferPool, made: Allocations) -> None:
    pool.take(MIB)
    held = pool.take(MIB)
    assert held.bytes_N.nbytes == MIB
    assert made.sizes == [MIB]


def test_smallest_that_fits_is_taken_and_none_that_wastes_too_much(pool: BufferPool, made: Allocations) -> None:
    _, two, three = buffers = [pool.take(size * MIB) for size in (8, 2, 3)]
    for buffer in buffers:
        buffer.release()
    taken = [pool.take(2 * MIB), pool.take(2 * MIB)]
    assert [place_of(buffer) for buffer in taken] == [place_of(two), place_of(three)]
    taken.append(pool.take(2 * MIB))  # 8 MiB are more than twice that
    assert made.sizes == [8 * MIB, 2 * MIB, 3 * MIB, 2 * MIB]


def test_free_memory_makes_way_for_a_larger_buffer(pool: BufferPool) -> None:
    """Never more than was in use at once: two of 1 MiB, then one of 3 MiB and nothing else."""
    for buffer in [pool.take(MIB), pool.take(MIB)]:
        buffer.release()
    assert pool.num_bytes == 2 * MIB
    larger = pool.take(3 * MIB)
    assert pool.num_bytes == larger.bytes_N.nbytes


def test_buffer_is_not_filled_while_a_device_copies_from_it(pool: BufferPool) -> None:
    copy, first, second = Copy(), pool.take(MIB), pool.take(MIB)
    first.release(copy)
    assert place_of(pool.take(MIB)) not in (place_of(first), place_of(second))
    copy.is_done = True
    held = pool.take(MIB), pool.take(MIB)
    assert place_of(first) in map(place_of, held)


def test_third_buffer_waits_for_the_oldest_copy(pool: BufferPool) -> None:
    buffers, copies = [pool.take(MIB), pool.take(MIB)], [Copy(), Copy()]
    for buffer, copy in zip(buffers, copies, strict=True):
        buffer.release(copy)
    assert place_of(pool.take(MIB)) == place_of(buffers[0])
    assert [copy.is_done for copy in copies] == [True, False]
    assert pool.num_bytes == 2 * MIB


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 8 * LEAST_BYTES)), max_size=60))
def test_pool_holds_no_more_than_was_in_use_at_once(acts: list[tuple[bool, int]]) -> None:
    made = Allocations()
    pool = BufferPool(allocate=made)
    in_use: list[Buffer] = []
    most_bytes = 0
    for is_end, num_bytes in acts:
        if is_end and in_use:
            in_use.pop(0).release()
        else:
            in_use.append(pool.take(num_bytes))
        assert len({place_of(buffer) for buffer in in_use}) == len(in_use)
        least_bytes = sum(buffer.bytes_N.nbytes for buffer in in_use)
        most_bytes = max(most_bytes, sum(2 * rounded_up(buffer.bytes_N.nbytes) for buffer in in_use))
        assert least_bytes <= pool.num_bytes <= most_bytes


@given(st.integers(1, 2**40))
def test_rounding_wastes_an_eighth_at_most(num_bytes: int) -> None:
    size = rounded_up(num_bytes)
    assert num_bytes <= size <= max(LEAST_BYTES, num_bytes * (1 + 1 / STEPS_PER_DOUBLING))
    assert rounded_up(size) == size


def test_sizes_of_samples_of_nearly_one_length_are_the_same() -> None:
    assert len({rounded_up(tokens * 30_720) for tokens in range(1000, 1020)}) <= 2
