"""A sample on its way in: rows in turn, and never more bytes than there is credit for."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.contracts import MAX_CHUNK_BYTES, CaptureJob, Chunk, TableSignature, TensorName
from services.errors import WireError
from services.replay.incoming import WINDOW_BYTES, IncomingSample

SIGNATURE = TableSignature(fingerprint="f", layer_ids=(0,), hidden_size=2**18, dtype="fp32")
"""1 MiB a row."""

ROW_BYTES = 2**20


def incoming(tokens: int) -> IncomingSample:
    job = CaptureJob(capture=7, prompt=0, epoch=0, input_ids=(1,) * tokens, loss_mask=(1,) * tokens, last_rows=(0,))
    return IncomingSample(job, SIGNATURE)


def chunk(start: int, end: int, tensor: TensorName = "context") -> Chunk:
    return Chunk(tensor=tensor, row_start=start, row_end=end, num_bytes=(end - start) * ROW_BYTES, crc32c=0)


def test_small_sample_is_credited_at_once_and_whole() -> None:
    sample = incoming(2)
    assert (sample.credit(), sample.credit()) == (3 * ROW_BYTES, 0)
    sample.accept(chunk(0, 2))
    sample.accept(chunk(0, 1, "last"))
    assert sample.credit() == 0
    assert (sample.sample("p").num_bytes, sample.sample("p").target) == (3 * ROW_BYTES, "p")
    assert [piece.tensor for piece in sample.sample("p").chunks] == ["context", "last"]


def test_large_sample_gets_back_what_was_stored() -> None:
    sample = incoming(20)
    assert sample.credit() == WINDOW_BYTES
    sample.accept(chunk(0, 3))
    assert sample.credit() == 3 * ROW_BYTES


def test_bytes_without_credit_are_refused() -> None:
    sample = incoming(20)
    with pytest.raises(WireError, match="sample 7: a chunk brings it to 1048576 bytes, credit was given for 0"):
        sample.accept(chunk(0, 1))
    sample.credit()
    for row in range(0, 8, 4):
        sample.accept(chunk(row, row + 4))
    with pytest.raises(WireError, match="wait for credit"):
        sample.accept(chunk(8, 9))


@pytest.mark.parametrize("start", [0, 2])
def test_rows_out_of_turn_are_refused(start: int) -> None:
    sample = incoming(4)
    sample.credit()
    sample.accept(chunk(0, 1))
    with pytest.raises(WireError, match=f"row {start} of context came where row 1 was due"):
        sample.accept(chunk(start, 3))


@given(
    tokens=st.integers(1, 40), sizes=st.lists(st.integers(1, MAX_CHUNK_BYTES // ROW_BYTES), min_size=40, max_size=40)
)
def test_whoever_waits_for_credit_gets_through_whatever_the_cuts(tokens: int, sizes: list[int]) -> None:
    sample, row, credit = incoming(tokens), 0, 0
    credit += sample.credit()
    for size in sizes:
        end = min(row + size, tokens)
        if row == end:
            break
        piece = chunk(row, end)
        assert credit >= piece.num_bytes, "all that was sent is stored, so there must be credit for the next chunk"
        sample.accept(piece)
        credit += sample.credit() - piece.num_bytes
        assert credit <= WINDOW_BYTES
        row = end
