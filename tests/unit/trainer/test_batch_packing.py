from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from services.contracts import CaptureJob, Chunk, Sample
from trainer.packing import Packing, Run, pack


def make_sample(length: int, last_rows: tuple[int, ...], chunk_rows: int = 100) -> Sample:
    job = CaptureJob(
        capture=0, prompt=0, epoch=0, input_ids=(7,) * length, loss_mask=(0,) * length, last_rows=last_rows
    )
    chunks = tuple(
        Chunk(tensor=name, row_start=start, row_end=min(start + chunk_rows, rows), num_bytes=1, crc32c=0)
        for name, rows in (("context", length), ("last", len(last_rows)))
        for start in range(0, rows, chunk_rows)
    )
    return Sample(job=job, chunks=chunks, num_bytes=1, target="")


def test_second_sample_stands_behind_the_first() -> None:
    packing = pack([make_sample(6, (2, 3, 4)), make_sample(4, (2,))])
    assert packing.lengths == (6, 4)
    assert packing.num_tokens == 10
    assert [(place.sample, place.number, place.runs) for place in packing.places] == [
        (0, 0, (Run(0, 0, 6),)),
        (0, 1, (Run(0, 2, 3),)),
        (1, 0, (Run(0, 6, 4),)),
        (1, 1, (Run(0, 8, 1),)),
    ]
    assert packing.unread == (range(2), range(5, 8), range(9, 10))


def test_scattered_rows_of_a_chunk_are_runs() -> None:
    packing = pack([make_sample(9, (0, 1, 4, 6, 7, 8), chunk_rows=5)])
    assert [place.runs for place in packing.places if place.chunk.tensor == "last"] == [
        (Run(0, 0, 2), Run(2, 4, 1), Run(3, 6, 2)),
        (Run(0, 8, 1),),
    ]
    assert packing.unread == (range(2, 4), range(5, 6))


def test_sample_without_last_rows_leaves_them_all_unread() -> None:
    assert pack([make_sample(3, ())]).unread == (range(3),)


def test_nothing_to_pack_is_an_empty_plan() -> None:
    assert pack([]) == Packing((), (), ())


@given(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 7), st.randoms(use_true_random=False)), max_size=5))
def test_every_row_is_written_once_or_unread(shapes: list[tuple[int, int, random.Random]]) -> None:
    samples = [
        make_sample(length, tuple(row for row in range(length) if coin.random() < 0.6), chunk_rows)
        for length, chunk_rows, coin in shapes
    ]
    packing = pack(samples)
    context: list[int] = []
    last = [row for gap in packing.unread for row in gap]
    for place in packing.places:
        rows = [run.to_row + number for run in place.runs for number in range(run.num_rows)]
        taken = [run.from_row + number for run in place.runs for number in range(run.num_rows)]
        assert taken == list(range(place.chunk.row_end - place.chunk.row_start))
        if place.chunk.tensor == "last":
            start = sum(packing.lengths[: place.sample])
            wanted = samples[place.sample].job.last_rows[place.chunk.row_start : place.chunk.row_end]
            assert [row - start for row in rows] == list(wanted)
        (context if place.chunk.tensor == "context" else last).extend(rows)
    assert context == list(range(packing.num_tokens))
    assert sorted(last) == list(range(packing.num_tokens))
