"""Memory of packed micro-batches, used again and again: new memory costs a page fault every 4 KiB, pinned memory more.

A buffer is in the hands of one micro-batch from `take` until it is given back. Micro-batches differ in size, so a free
buffer serves any that needs at least half of it. All buffers together hold no more than was once in use at the same
time: beyond that, free ones go, the one that was idle longest first.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import Protocol

import torch
from torch import Tensor

ALIGNMENT = 64
"""Tensors in a buffer begin at multiples of so many bytes, as torch's own do."""

LEAST_BYTES = 64 * 1024

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
    """Consecutive bytes on the host, cut into tensors one after another."""

    def __init__(self, memory: Tensor) -> None:
        self.memory = memory
        self._used = 0

    @property
    def num_bytes(self) -> int:
        """Its size."""
        return len(self.memory)

    def cut(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """The next tensor, not initialised."""
        start = -(-self._used // ALIGNMENT) * ALIGNMENT
        self._used = start + torch.Size(shape).numel() * dtype.itemsize
        assert self._used <= self.num_bytes, "the buffer was taken for less than is cut from it"
        return self.memory[start : self._used].view(dtype).view(shape)

    def clear(self) -> None:
        """Forget what was cut."""
        self._used = 0


class BufferPool:
    """Buffers for micro-batches. One thread takes, any gives back.

    Args:
        pinned: Whether a GPU copies from them; then their pages are locked once, not with every copy.
    """

    def __init__(self, *, pinned: bool = False) -> None:
        self._pinned = pinned
        self._lock = threading.Lock()
        self._free: list[Buffer] = []  # idle longest first
        self._copying: deque[tuple[Buffer, Copied]] = deque()  # begun first, done first
        self._in_use_bytes = 0
        """Of buffers that are taken or being copied from."""
        self._most_in_use_bytes = 0

    @property
    def num_bytes(self) -> int:
        """Of all buffers, free ones included."""
        with self._lock:
            return self._held_bytes()

    def take(self, num_bytes: int) -> Buffer:
        """A buffer of at least so many bytes; its content is whatever was there before."""
        while True:
            with self._lock:
                while self._copying and self._copying[0][1].query():
                    self._end_use(self._copying.popleft()[0])
                buffer = self._best_free(num_bytes)
                under_way = self._copying[0][1] if len(self._copying) >= MOST_COPYING else None
                if buffer is not None or under_way is None:
                    return self._begin_use(buffer or self._new(num_bytes))
            under_way.synchronize()

    def give_back(self, buffer: Buffer, copied: Copied | None = None) -> None:
        """Nobody on the host reads the buffer any more.

        Args:
            buffer: From `take`.
            copied: A device reads it until then; None if it does not.
        """
        with self._lock:
            if copied is None:
                self._end_use(buffer)
            else:
                self._copying.append((buffer, copied))

    def _new(self, num_bytes: int) -> Buffer:
        return Buffer(torch.empty(_size_class(num_bytes), dtype=torch.uint8, pin_memory=self._pinned))

    def _best_free(self, num_bytes: int) -> Buffer | None:
        largest = max(2 * num_bytes, LEAST_BYTES)
        fitting = (buffer for buffer in self._free if num_bytes <= buffer.num_bytes <= largest)
        best = min(fitting, key=lambda buffer: buffer.num_bytes, default=None)
        if best is not None:
            self._free.remove(best)
        return best

    def _begin_use(self, buffer: Buffer) -> Buffer:
        buffer.clear()
        self._in_use_bytes += buffer.num_bytes
        self._most_in_use_bytes = max(self._most_in_use_bytes, self._in_use_bytes)
        self._trim()
        return buffer

    def _end_use(self, buffer: Buffer) -> None:
        self._in_use_bytes -= buffer.num_bytes
        self._free.append(buffer)
        self._trim()

    def _trim(self) -> None:
        while self._free and self._held_bytes() > self._most_in_use_bytes:
            del self._free[0]

    def _held_bytes(self) -> int:
        return self._in_use_bytes + sum(buffer.num_bytes for buffer in self._free)


def _size_class(num_bytes: int) -> int:
    """One of four sizes an octave, so that a micro-batch of about the same size finds the buffer fitting later."""
    size = max(num_bytes, LEAST_BYTES)
    step = 1 << (size.bit_length() - 3)
    return -(-size // step) * step
