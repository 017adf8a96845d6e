"""How a capture's two tensors are cut along the token axis. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from services.contracts import TensorName


class Piece(NamedTuple):
    """Rows [row_start, row_end) of one tensor."""

    tensor: TensorName
    row_start: int
    row_end: int


def cut(
    *, context_rows: int, context_row_bytes: int, last_rows: int, last_row_bytes: int, chunk_bytes: int
) -> Iterator[Piece]:
    """The pieces of one capture, context first, rows in order, each of at most `chunk_bytes`.

    The pieces of a tensor differ by at most one row, so that no stream ends in a sliver.

    Raises:
        ValueError: One row is larger than a chunk.
    """
    yield from _cut_tensor("context", context_rows, context_row_bytes, chunk_bytes)
    yield from _cut_tensor("last", last_rows, last_row_bytes, chunk_bytes)


def _cut_tensor(tensor: TensorName, num_rows: int, row_bytes: int, chunk_bytes: int) -> Iterator[Piece]:
    most_rows = chunk_bytes // row_bytes
    if most_rows == 0:
        raise ValueError(f"one {tensor} row of {row_bytes} bytes is larger than a chunk of {chunk_bytes}")
    num_pieces = -(-num_rows // most_rows)
    for piece in range(num_pieces):
        yield Piece(tensor, piece * num_rows // num_pieces, (piece + 1) * num_rows // num_pieces)
