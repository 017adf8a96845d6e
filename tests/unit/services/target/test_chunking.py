"""Cutting a capture into chunks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.target.chunking import Piece, cut


def test_cut_by_hand() -> None:
    pieces = cut(context_rows=5, context_row_bytes=8, last_rows=3, last_row_bytes=4, chunk_bytes=16)
    # 2 context rows a chunk at most: 5 rows in 3 pieces; 4 last rows a chunk: 3 rows in one.
    assert list(pieces) == [
        Piece("context", 0, 1),
        Piece("context", 1, 3),
        Piece("context", 3, 5),
        Piece("last", 0, 3),
    ]


def test_cut_without_last_rows() -> None:
    pieces = cut(context_rows=1, context_row_bytes=8, last_rows=0, last_row_bytes=4, chunk_bytes=8)
    assert list(pieces) == [Piece("context", 0, 1)]


def test_cut_refuses_a_row_larger_than_a_chunk() -> None:
    with pytest.raises(ValueError, match="one context row of 8 bytes is larger than a chunk of 7"):
        list(cut(context_rows=1, context_row_bytes=8, last_rows=0, last_row_bytes=4, chunk_bytes=7))


@given(
    context_rows=st.integers(1, 300),
    last_rows=st.integers(0, 300),
    row_bytes=st.integers(1, 50),
    chunk_bytes=st.integers(50, 1000),
)
def test_cut_covers_every_row_once(context_rows: int, last_rows: int, row_bytes: int, chunk_bytes: int) -> None:
    pieces = list(
        cut(
            context_rows=context_rows,
            context_row_bytes=row_bytes,
            last_rows=last_rows,
            last_row_bytes=row_bytes,
            chunk_bytes=chunk_bytes,
        )
    )
    rows = [(piece.tensor, row) for piece in pieces for row in range(piece.row_start, piece.row_end)]
    assert rows == [("context", row) for row in range(context_rows)] + [("last", row) for row in range(last_rows)]
    assert all((piece.row_end - piece.row_start) * row_bytes <= chunk_bytes for piece in pieces)
