"""A capture's stream: the one right order, and every way to be wrong."""

from __future__ import annotations

import pytest

from services.contracts import CaptureJob, Chunk, Generation, LastRows
from services.errors import WireError
from services.target.framing import FramedChunk
from services.target.stream import StreamCheck
from services.wire import target_pb2 as wire

JOB = CaptureJob(capture=5, attempt=1, prompt=0, epoch=0, input_ids=(1, 2, 3), loss_mask=(0, 1, 1), last_rows=(1,))
CONTEXT_WIDTH, LAST_WIDTH = 8, 4  # two layers of hidden size 4


def _check() -> StreamCheck:
    return StreamCheck(JOB, num_layers=2, dtype="fp16", chunk_bytes=32)


def _chunk(tensor: str, start: int, end: int, /, *, payload_bytes: int | None = None, **changes: object) -> FramedChunk:
    width = CONTEXT_WIDTH if tensor == "CONTEXT" else LAST_WIDTH
    fields: dict[str, object] = {
        "sample_id": 5,
        "generation": 1,
        "tensor": tensor,
        "row_start": start,
        "row_end": end,
        "row_width": width,
        "dtype": wire.FP16,
        "crc32c": 77,
    }
    header = wire.FeatureChunk(**{**fields, **changes})  # type: ignore[arg-type]
    num_bytes = max(end - start, 0) * width * 2 if payload_bytes is None else payload_bytes
    return FramedChunk(header, memoryview(bytes(num_bytes)))


def _totals(num_chunks: int = 3, context_rows: int = 3, last_rows: int = 1, num_bytes: int = 56) -> wire.Totals:
    return wire.Totals(num_chunks=num_chunks, context_rows=context_rows, last_rows=last_rows, num_bytes=num_bytes)


FIRST, SECOND = _chunk("CONTEXT", 0, 2), _chunk("CONTEXT", 2, 3)
FINAL = _chunk("LAST", 0, 1, totals=_totals())


def test_accepts_a_whole_stream() -> None:
    check = _check()
    chunks = [check.accept(framed) for framed in (FIRST, SECOND, FINAL)]
    check.finish()
    assert chunks == [
        Chunk(tensor="context", row_start=0, row_end=2, num_bytes=32, crc32c=77),
        Chunk(tensor="context", row_start=2, row_end=3, num_bytes=16, crc32c=77),
        Chunk(tensor="last", row_start=0, row_end=1, num_bytes=8, crc32c=77),
    ]


def test_refuses_an_end_without_the_final_chunk() -> None:
    check = _check()
    check.accept(FIRST)
    with pytest.raises(WireError, match="capture 5, try 1: the stream ended after 1 chunks without the final one"):
        check.finish()


@pytest.mark.parametrize(
    ("stream", "says"),
    [
        ([_chunk("CONTEXT", 0, 1, sample_id=6)], "a chunk of sample 6, try 1, came"),
        ([_chunk("CONTEXT", 0, 1, generation=0)], "a chunk of sample 5, try 0, came"),
        ([_chunk("CONTEXT", 0, 1, dtype=wire.BF16)], "fp16 was asked for"),
        ([_chunk("CONTEXT", 0, 1, tensor=7)], "tensor number 7 is unknown"),
        ([_chunk("CONTEXT", 1, 2)], "rows 1 to 2 of context came after row 0 of 3"),
        ([FIRST, FIRST], "rows 0 to 2 of context came after row 2"),
        ([_chunk("CONTEXT", 0, 0)], "rows 0 to 0"),
        ([FIRST, _chunk("CONTEXT", 2, 4)], "rows 2 to 4 of context"),
        ([FIRST, _chunk("LAST", 0, 1)], "rows of last came after 2 of 3 context rows"),
        ([_chunk("CONTEXT", 0, 1, row_width=7)], "width 7 do not fit 2 hidden states"),
        ([_chunk("CONTEXT", 0, 1, row_width=0)], "width 0 do not fit"),
        ([FIRST, SECOND, _chunk("LAST", 0, 1, row_width=5)], "width 5 do not fit 1 hidden states of size 4"),
        ([_chunk("CONTEXT", 0, 1, payload_bytes=15)], "are 16 bytes, but 15 came"),
        ([_chunk("CONTEXT", 0, 3)], "a chunk of 48 bytes came, at most 32"),
        ([FIRST, _chunk("CONTEXT", 2, 3, totals=_totals(2, 3, 0, 48))], "wanted"),
        ([FIRST, SECOND, _chunk("LAST", 0, 1, totals=_totals(num_bytes=57))], "57"),
        ([FIRST, SECOND, FINAL, FINAL], "a chunk came after the final one"),
    ],
)
def test_refuses(stream: list[FramedChunk], says: str) -> None:
    check = _check()
    for framed in stream[:-1]:
        check.accept(framed)
    with pytest.raises(WireError, match=says):
        check.accept(stream[-1])


QUESTION = JOB.model_copy(
    update={
        "loss_mask": (0, 0, 0),
        "last_rows": (),
        "generate": Generation(max_new_tokens=2, stop_token_ids=(), last_rows=LastRows.BETWEEN),
    }
)


def _answer_check() -> StreamCheck:
    return StreamCheck(QUESTION, num_layers=2, dtype="fp16", chunk_bytes=1000)


def test_rows_wanted_follow_from_the_answer_of_the_first_chunk() -> None:
    check = _answer_check()
    check.accept(_chunk("CONTEXT", 0, 5, answer_token_ids=[8, 9]))
    check.accept(_chunk("LAST", 0, 1, totals=_totals(2, 5, 1, 88)))
    check.finish()


@pytest.mark.parametrize("answer", [[], [1, 2, 3]])
def test_answer_of_another_length_than_asked_is_refused(answer: list[int]) -> None:
    with pytest.raises(WireError, match=f"an answer of {len(answer)} tokens came first, one of 1 to 2 was asked for"):
        _answer_check().accept(_chunk("CONTEXT", 0, 3, answer_token_ids=answer))


def test_answer_that_nobody_asked_for_is_refused() -> None:
    with pytest.raises(WireError, match="an answer of 1 tokens came"):
        _check().accept(_chunk("CONTEXT", 0, 2, answer_token_ids=[4]))


def test_second_answer_is_refused() -> None:
    check = _answer_check()
    check.accept(_chunk("CONTEXT", 0, 2, answer_token_ids=[8]))
    with pytest.raises(WireError, match="an answer of 1 tokens came"):
        check.accept(_chunk("CONTEXT", 2, 4, answer_token_ids=[8]))


def test_rows_of_fp8_carry_a_scale_a_hidden_state() -> None:
    check = StreamCheck(JOB, num_layers=2, dtype="fp8_e4m3", chunk_bytes=32)
    fp8 = {"dtype": wire.FP8_E4M3}
    check.accept(_chunk("CONTEXT", 0, 2, payload_bytes=2 * 2 * (4 + 4), **fp8))
    check.accept(_chunk("CONTEXT", 2, 3, payload_bytes=2 * (4 + 4), **fp8))
    with pytest.raises(WireError, match="rows 0 to 1 of last are 8 bytes, but 4 came"):
        check.accept(_chunk("LAST", 0, 1, payload_bytes=4, **fp8))
    check.accept(_chunk("LAST", 0, 1, payload_bytes=8, totals=_totals(num_bytes=56), **fp8))
    check.finish()
