"""Host memory that captures are written into, used again and again.

A sample's features are tens of megabytes. Fresh memory of that size costs a page fault for every 4 KiB of it, and
pinned memory a call to the driver that waits for the GPU; memory that has been used before costs neither.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch import Tensor

KEPT_BYTES = 2 * 1024**3
"""Most memory that a pool keeps unused. What is in use is bounded by the captures that a target serves at once."""

SMALLEST_BYTES = 64 * 1024
STEPS_PER_DOUBLING = 8
"""Sizes are rounded up to one of so many between a power of two and the next: at most an eighth is wasted."""

LARGEST_WASTE = 2
"""A buffer is not used for a sample that needs less than one in so many of its bytes."""


class Buffer:
    """Memory on loan from a pool. One that is dropped without `release` is freed as any other memory.

    Attributes:
        bytes_N: uint8, as many as were asked for; pinned if the pool's are.
    """

    def __init__(self, pool: BufferPool, whole: Tensor, num_bytes: int) -> None:
        self.bytes_N = whole[:num_bytes]
        self._pool = pool
        self._whole: Tensor | None = whole

    def release(self) -> None:
        """Give it back: whoever comes next writes over it. Again: nothing happens."""
        whole, self._whole = self._whole, None
        if whole is not None:
            self._pool.give_back(whole)


class BufferPool:
    """Buffers that are not in use, smallest first. Threads may share it.

    Args:
        kept_bytes: Most that it keeps; beyond that the buffers unused for longest are freed.
        pinned: Whether a GPU can read and write them by itself.
        allocate: Makes memory of a size.
    """

    def __init__(
        self,
        kept_bytes: int = KEPT_BYTES,
        *,
        pinned: bool = False,
        allocate: Callable[[int], Tensor] | None = None,
    ) -> None:
        self._kept_bytes = kept_bytes
        self._allocate = allocate or (lambda size: torch.empty(size, dtype=torch.uint8, pin_memory=pinned))
        self._unused: list[Tensor] = []  # given back last comes last
        self._lock = threading.Lock()

    @property
    def unused_bytes(self) -> int:
        """Memory kept for later."""
        with self._lock:
            return self._sum()

    def take(self, num_bytes: int) -> Buffer:
        """A buffer of so many bytes, holding anything; the smallest unused one that fits, or a new one."""
        size = rounded_up(num_bytes)
        with self._lock:
            fitting = [whole for whole in self._unused if size <= whole.nbytes <= LARGEST_WASTE * size]
            if fitting:
                best = min(fitting, key=lambda whole: whole.nbytes)
                self._unused = [whole for whole in self._unused if whole is not best]
                return Buffer(self, best, num_bytes)
        return Buffer(self, self._allocate(size), num_bytes)

    def give_back(self, whole: Tensor) -> None:
        """Keep a buffer for the next; `Buffer.release` does this."""
        with self._lock:
            self._unused.append(whole)
            while self._sum() > self._kept_bytes:
                self._unused.pop(0)

    def _sum(self) -> int:
        return sum(whole.nbytes for whole in self._unused)


def rounded_up(num_bytes: int) -> int:
    """The size of the buffer for so many bytes: samples of nearly the same length share buffers."""
    if num_bytes <= SMALLEST_BYTES:
        return SMALLEST_BYTES
    step = 2 ** ((num_bytes - 1).bit_length() - 1) // STEPS_PER_DOUBLING
    return -(-num_bytes // step) * step
