"""Keys and values of attention, and the cache that keeps them while decoding."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

ALIGNMENT = 16
"""Entries that are read are a multiple of this, as attention kernels like it."""

SPARE_ENTRIES = 64
"""Room that a growing cache has at least beyond what is needed."""


class KeyValues(NamedTuple):
    """Keys and values of one layer, each [B, key heads, rows, head size]; keys are rotated already."""

    keys: Tensor
    values: Tensor


class Places(NamedTuple):
    """Where one forward pass writes, the same in all layers.

    Attributes:
        sequences: The sequences that take part.
        end: Entries that are read of each, all that are written among them.
        entries: [b · R] places written, among those of all sequences.
    """

    sequences: slice
    end: int
    entries: Tensor


class RaggedCache:
    """Keys and values of all layers for several sequences of different lengths.

    Entry p of a sequence is what stands at its position p, so no sequence is padded. What was written past its end, or
    was taken back, is written over once it gets there; until then a mask by position (`attention.positions_seen`) hides
    it. Sequences are numbered without gaps; `move` closes those that ended ones leave.

    Args:
        max_sequences: Most that are decoded at once.
    """

    def __init__(self, max_sequences: int) -> None:
        self._max_sequences = max_sequences
        self._num_entries = 0
        self._room: dict[int, KeyValues] = {}

    def places(self, positions: Tensor, length: int, first: int = 0) -> Places:
        """Where rows at these positions go, one set of rows for each of b sequences.

        Args:
            positions: [b, R] int64.
            length: At least every position + 1, known without asking the device.
            first: The first of the b sequences.
        """
        num_sequences = len(positions)
        assert first + num_sequences <= self._max_sequences, "more sequences than the cache was made for"
        end = _aligned(length)
        if end > self._num_entries:
            self._num_entries = _aligned(end + max(SPARE_ENTRIES, end // 2))
        starts = torch.arange(first, first + num_sequences, device=positions.device) * self._num_entries
        return Places(slice(first, first + num_sequences), end, (starts[:, None] + positions).flatten())

    def append(self, layer: int, rows: KeyValues, places: Places) -> KeyValues:
        """Write a layer's rows [b, key heads, R, head size]; returns what their sequences have up to `places.end`."""
        room = self._room_of(layer, rows)
        for kept, new in zip(room, rows, strict=True):
            kept.flatten(0, 1).index_copy_(0, places.entries, new.transpose(1, 2).flatten(0, 1))
        return KeyValues(*(kept[places.sequences, : places.end].transpose(1, 2) for kept in room))

    def sequence(self, layer: int, sequence: int, length: int) -> KeyValues:
        """The first entries of one sequence, [1, key heads, length, head size]; a view."""
        rows = (kept[sequence : sequence + 1, :length].transpose(1, 2) for kept in self._room[layer])
        return KeyValues(*rows)

    def move(self, source: int, place: int) -> None:
        """Put a sequence in the place of another."""
        if source != place:
            for room in self._room.values():
                for kept in room:
                    kept[place].copy_(kept[source])

    def _room_of(self, layer: int, rows: KeyValues) -> KeyValues:
        room = self._room.get(layer)
        if room is None or room.keys.shape[1] < self._num_entries:
            room = KeyValues(*(self._grown(new, None if room is None else room[i]) for i, new in enumerate(rows)))
            self._room[layer] = room
        return room

    def _grown(self, like: Tensor, old: Tensor | None) -> Tensor:
        # Zeros, not just room: a masked entry has weight 0, but 0 times what memory happens to hold may be NaN.
        grown = like.new_zeros(self._max_sequences, self._num_entries, like.shape[1], like.shape[3])
        if old is not None:
            grown[:, : old.shape[1]] = old
        return grown


def _aligned(length: int) -> int:
    return -(-length // ALIGNMENT) * ALIGNMENT
