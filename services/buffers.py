"""Host memory for features, used again and again: by captures on a target, by micro-batches on a rank.

They are tens of megabytes each. Fresh memory of that size costs a page fault for every 4 KiB of it, and pinned memory a
call to the driver that waits for the GPU; memory that has been used before costs neither.

A free buffer serves whoever needs at least half of it. All buffers of a pool together hold no more than was once in use
at the same time: beyond that, free ones go, the one that was idle longest first.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

ALIGNMENT = 64
"""Tensors in a buffer begin at multiples of so many bytes, as torch's own do."""

LEAST_BYTES = 64 * 1024
STEPS_PER_DOUBLING = 8
"""Sizes are rounded up to one of so many between a power of two and the next: at most an eighth is wasted."""

MOST_COPYING = 2
"""Buffers from which a device still copies: while one is copied, the next one is filled."""


class Copied(Protocol):
    """Says when a copy to a device is done, as `torch.cuda.Event` does."""

    def query(self) -> bool:
        """Whether it is."""
        ...

    def synchronize(self) -> None:
        """Wait until it is."""
        ...


class Buffer:
    """Memory on loan from a pool, cut into tensors one after another. One that is dropped is as good as released.

    Attributes:
        bytes_N: uint8, as many as were asked for; pinned if the pool's are.
    """

    def __init__(self, pool: BufferPool, whole: Tensor, num_bytes: int) -> None:
        """Use `BufferPool.take`."""
        self.bytes_N = whole[:num_bytes]
        self._cut_bytes = 0
        self._pool, self._whole = pool, whole
        self._drop = weakref.finalize(self, pool.dropped.append, whole)
        self._drop.atexit = False

    def cut(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """The next tensor, not initialised."""
        start = -(-self._cut_bytes // ALIGNMENT) * ALIGNMENT
        self._cut_bytes = start + torch.Size(shape).numel() * dtype.itemsize
        assert self._cut_bytes <= self.bytes_N.nbytes, "the buffer was taken for less than is cut from it"
        return self.bytes_N[start : self._cut_bytes].view(dtype).view(shape)

    def release(self, copied: Copied | None = None) -> None:
        """Give it back: whoever comes next writes over it. Again: nothing happens.

        Args:
            copied: A device reads it until then; None: nobody does.
        """
        if self._drop.detach() is not None:
            self._pool.give_back(self._whole, copied)


class BufferPool:
    """Buffers that are not in use. Threads may share it.

    Args:
        pinned: Whether a GPU can read and write them by itself; then their pages are locked once, not with every copy.
        allocate: Makes memory of a size.

    Attributes:
        dropped: Memory of buffers that nobody released; garbage is collected at any moment, so no lock is taken then.
    """

    def __init__(self, *, pinned: bool = False, allocate: Callable[[int], Tensor] | None = None) -> None:
        self._allocate = allocate or (lambda size: torch.empty(size, dtype=torch.uint8, pin_memory=pinned))
        self.dropped: deque[Tensor] = deque()
        self._lock = threading.Lock()
        self._free: list[Tensor] = []  # idle longest first
        self._copying: deque[tuple[Tensor, Copied]] = deque()  # begun first, done first
        self._in_use_bytes = 0
        """Of buffers that are taken or being copied from."""
        self._most_in_use_bytes = 0

    @property
    def num_bytes(self) -> int:
        """Of all buffers, free ones included."""
        with self._lock:
            self._take_in_dropped()
            return self._held_bytes()

    @property
    def free_bytes(self) -> int:
        """Of buffers that nobody uses."""
        with self._lock:
            self._take_in_dropped()
            return self._held_bytes() - self._in_use_bytes

    def take(self, num_bytes: int) -> Buffer:
        """A buffer of so many bytes, holding anything: the smallest free one that fits, or a new one."""
        size = rounded_up(num_bytes)
        while True:
            with self._lock:
                self._take_in_dropped()
                while self._copying and self._copying[0][1].query():
                    self._set_free(self._copying.popleft()[0])
                whole = self._best_free(size)
                under_way = self._copying[0][1] if len(self._copying) >= MOST_COPYING else None
                if whole is not None or under_way is None:
                    return Buffer(self, self._begin_use(self._allocate(size) if whole is None else whole), num_bytes)
            under_way.synchronize()

    def give_back(self, whole: Tensor, copied: Copied | None) -> None:
        """End the use of memory; `Buffer.release` does this."""
        with self._lock:
            if copied is None:
                self._set_free(whole)
            else:
                self._copying.append((whole, copied))

    def _take_in_dropped(self) -> None:
        while self.dropped:
            self._set_free(self.dropped.popleft())

    def _best_free(self, size: int) -> Tensor | None:
        fitting = (index for index, whole in enumerate(self._free) if size <= whole.nbytes <= 2 * size)
        best = min(fitting, key=lambda index: self._free[index].nbytes, default=None)
        return None if best is None else self._free.pop(best)

    def _begin_use(self, whole: Tensor) -> Tensor:
        self._in_use_bytes += whole.nbytes
        self._most_in_use_bytes = max(self._most_in_use_bytes, self._in_use_bytes)
        self._trim()
        return whole

    def _set_free(self, whole: Tensor) -> None:
        self._in_use_bytes -= whole.nbytes
        self._free.append(whole)
        self._trim()

    def _trim(self) -> None:
        while self._free and self._held_bytes() > self._most_in_use_bytes:
            del self._free[0]

    def _held_bytes(self) -> int:
        return self._in_use_bytes + sum(whole.nbytes for whole in self._free)


def rounded_up(num_bytes: int) -> int:
    """The size of the buffer for so many bytes: what is nearly of one length shares buffers."""
    if num_bytes <= LEAST_BYTES:
        return LEAST_BYTES
    step = 2 ** ((num_bytes - 1).bit_length() - 1) // STEPS_PER_DOUBLING
    return -(-num_bytes // step) * step
