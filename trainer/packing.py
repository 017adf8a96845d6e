"""Where each chunk of each sample goes in one packed micro-batch. No torch: rows in, rows out.

Samples stand end to end in one row of ΣT tokens. A chunk's context rows are consecutive there as well. Its rows of the
last hidden state are scattered over the sample's tokens, but the tokens of an answer follow one another, so they are a
few long runs.

    tokens of the pack     0 1 2 3 4 5 | 6 7 8 9          two samples, of 6 and 4 tokens
    last hidden state          2 3 4         8            its rows: runs of 3 and 1; `unread` are the others
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

from services.contracts import Chunk, Sample


class Run(NamedTuple):
    """Consecutive rows of a chunk that are consecutive in the pack, too."""

    from_row: int
    """First row within the chunk."""
    to_row: int
    """First row within the pack."""
    num_rows: int


class ChunkPlace(NamedTuple):
    """One chunk and where its rows go."""

    sample: int
    """Which sample of the micro-batch."""
    number: int
    """Which chunk of the sample."""
    chunk: Chunk
    runs: tuple[Run, ...]


class Packing(NamedTuple):
    """Samples of one micro-batch, packed."""

    lengths: tuple[int, ...]
    """Tokens of each sample."""
    places: tuple[ChunkPlace, ...]
    unread: tuple[range, ...]
    """Rows of the pack whose last hidden state did not travel, because no loss reads it."""

    @property
    def num_tokens(self) -> int:
        """ΣT."""
        return sum(self.lengths)


def pack(samples: Sequence[Sample]) -> Packing:
    """Plan a micro-batch. The table has checked that a sample's chunks are all its rows, each once and in order."""
    lengths = tuple(sample.job.num_tokens for sample in samples)
    starts = [end - length for end, length in zip(accumulate(lengths), lengths, strict=True)]
    places = tuple(
        ChunkPlace(order, number, chunk, tuple(_runs(chunk, sample.job.last_rows, start)))
        for order, (sample, start) in enumerate(zip(samples, starts, strict=True))
        for number, chunk in enumerate(sample.chunks)
    )
    read = [start + row for sample, start in zip(samples, starts, strict=True) for row in sample.job.last_rows]
    return Packing(lengths, places, tuple(_gaps(read, sum(lengths))))


def _runs(chunk: Chunk, last_rows: Sequence[int], start: int) -> Iterator[Run]:
    if chunk.tensor == "context":
        yield Run(0, start + chunk.row_start, chunk.row_end - chunk.row_start)
        return
    first = 0
    rows = last_rows[chunk.row_start : chunk.row_end]
    for end in range(1, len(rows) + 1):
        if end == len(rows) or rows[end] != rows[end - 1] + 1:
            yield Run(first, start + rows[first], end - first)
            first = end


def _gaps(rows: Sequence[int], num_rows: int) -> Iterator[range]:
    """What is missing between ascending rows, from 0 to num_rows."""
    before = -1
    for row in (*rows, num_rows):
        if row > before + 1:
            yield range(before + 1, row)
        before = row
