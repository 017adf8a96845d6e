"""Memory that micro-batches are packed into, one after another."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer.buffers import ALIGNMENT, LEAST_BYTES, Buffer, BufferPool

MIB = 2**20


class Copy:
    """A copy to a device that is done when it is told so, or waited for."""

    def __init__(self) -> None:
        self.is_done = False

    def query(self) -> bool:
        return self.is_done

    def synchronize(self) -> None:
        self.is_done = True


def test_tensors_of_a_buffer_are_aligned_and_apart() -> None:
    buffer = BufferPool().take(1000)
    first, second = buffer.cut(1, 3, dtype=torch.bfloat16), buffer.cut(2, 2, dtype=torch.float32)
    assert (first.shape, second.shape) == ((1, 3), (2, 2))
    assert second.data_ptr() - first.data_ptr() == ALIGNMENT
    first.fill_(1)
    second.fill_(2)
    assert first.tolist() == [[1, 1, 1]]


def test_more_than_was_taken_is_not_cut() -> None:
    buffer = Buffer(torch.empty(100, dtype=torch.uint8))
    with pytest.raises(AssertionError, match="taken for less"):
        buffer.cut(101, dtype=torch.uint8)


def test_memory_given_back_is_used_again() -> None:
    pool = BufferPool()
    first = pool.take(MIB)
    first.cut(MIB, dtype=torch.uint8)
    pool.give_back(first)
    again = pool.take(MIB - 5)
    assert again.memory.data_ptr() == first.memory.data_ptr()
    again.cut(MIB - 5, dtype=torch.uint8)
    assert pool.num_bytes == first.num_bytes


def test_memory_in_use_is_given_to_nobody_else() -> None:
    pool = BufferPool()
    first, second = pool.take(MIB), pool.take(MIB)
    assert first.memory.data_ptr() != second.memory.data_ptr()


def test_small_micro_batch_does_not_take_a_large_buffer() -> None:
    pool = BufferPool()
    large, small = pool.take(4 * MIB), pool.take(MIB)
    pool.give_back(large)
    pool.give_back(small)
    assert pool.take(MIB) is small
    assert pool.take(3 * MIB) is large


def test_free_memory_makes_way_for_a_larger_buffer() -> None:
    """Never more than was in use at once: two of 1 MiB, then one of 3 MiB and nothing else."""
    pool = BufferPool()
    small = [pool.take(MIB), pool.take(MIB)]
    for buffer in small:
        pool.give_back(buffer)
    assert pool.num_bytes == 2 * MIB
    pool.take(3 * MIB)
    assert pool.num_bytes == 3 * MIB


def test_buffer_is_not_filled_while_a_device_copies_from_it() -> None:
    pool, copies = BufferPool(), [Copy(), Copy()]
    first, second = pool.take(MIB), pool.take(MIB)
    pool.give_back(first, copies[0])
    assert pool.take(MIB // 2) not in (first, second)
    copies[0].is_done = True
    assert pool.take(MIB) is first


def test_third_buffer_waits_for_the_oldest_copy() -> None:
    pool, copies = BufferPool(), [Copy(), Copy()]
    buffers = [pool.take(MIB), pool.take(MIB)]
    for buffer, copy in zip(buffers, copies, strict=True):
        pool.give_back(buffer, copy)
    assert pool.take(MIB) is buffers[0]
    assert [copy.is_done for copy in copies] == [True, False]
    assert pool.num_bytes == 2 * MIB


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 8 * LEAST_BYTES)), max_size=60))
def test_pool_holds_no_more_than_was_in_use_at_once(acts: list[tuple[bool, int]]) -> None:
    pool = BufferPool()
    in_use: list[Buffer] = []
    most_bytes = 0
    for is_end, num_bytes in acts:
        if is_end and in_use:
            pool.give_back(in_use.pop(0))
        else:
            buffer = pool.take(num_bytes)
            assert num_bytes <= buffer.num_bytes <= max(2 * num_bytes, LEAST_BYTES)
            assert all(buffer is not other for other in in_use)
            in_use.append(buffer)
        used_bytes = sum(buffer.num_bytes for buffer in in_use)
        most_bytes = max(most_bytes, used_bytes)
        assert used_bytes <= pool.num_bytes <= most_bytes
