"""Keys and values of attention, and the cache that keeps them while drafting."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

FIRST_CACHE_ROWS = 64
"""Context rows that a drafting cache has room for at first; it doubles as needed."""


class KeyValues(NamedTuple):
    """Keys and values of one layer, each [B, key heads, rows, head size]; keys are rotated already."""

    keys: Tensor
    values: Tensor


class ContextCache:
    """Keys and values of one layer's context rows, growing without copying everything at each append."""

    def __init__(self) -> None:
        self._room: KeyValues | None = None
        self._length = 0

    def append(self, rows: KeyValues) -> None:
        """Add rows [1, key heads, R, head size] at the end."""
        end = self._length + rows.keys.shape[2]
        if self._room is None or end > self._room.keys.shape[2]:
            self._grow(rows, max(FIRST_CACHE_ROWS, 2 * end))
        assert self._room is not None
        self._room.keys[:, :, self._length : end] = rows.keys
        self._room.values[:, :, self._length : end] = rows.values
        self._length = end

    def rows(self) -> KeyValues:
        """All rows so far; a view."""
        assert self._room is not None
        return KeyValues(self._room.keys[:, :, : self._length], self._room.values[:, :, : self._length])

    def crop(self, length: int) -> None:
        """Forget all rows but the first ones."""
        self._length = length

    def _grow(self, like: KeyValues, capacity: int) -> None:
        old = self._room
        batch, heads, _, size = like.keys.shape
        self._room = KeyValues(*(rows.new_empty(batch, heads, capacity, size) for rows in like))
        if old is not None:
            self._room.keys[:, :, : self._length] = old.keys[:, :, : self._length]
            self._room.values[:, :, : self._length] = old.values[:, :, : self._length]
