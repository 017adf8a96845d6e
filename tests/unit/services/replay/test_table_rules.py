"""The pure rules of the table: which uses a job feeds, which chunks make a sample."""

from __future__ import annotations

import pytest

from services.contracts import CaptureJob, Chunk, Sample, TableSignature, TensorName
from services.errors import WireError
from services.replay.table import check_chunks, uses_of

SIGNATURE = TableSignature(fingerprint="f", layer_ids=(0, 2), hidden_size=4, dtype="bf16")
"""16 bytes a context row, 8 bytes a last row."""


def job(reuse: int = 1, ks: tuple[int, ...] | None = None) -> CaptureJob:
    return CaptureJob(
        capture=7, prompt=0, epoch=0, reuse=reuse, ks=ks, input_ids=(1, 2, 3), loss_mask=(0, 1, 1), last_rows=(1, 2)
    )


def chunk(tensor: TensorName, start: int, end: int, num_bytes: int) -> Chunk:
    return Chunk(tensor=tensor, row_start=start, row_end=end, num_bytes=num_bytes, crc32c=0)


def check(*chunks: Chunk) -> None:
    check_chunks(Sample(job=job(), chunks=chunks, num_bytes=64, target="t"), SIGNATURE)


def test_job_feeds_all_its_uses_unless_it_names_some() -> None:
    assert uses_of(job(reuse=3)) == (0, 1, 2)
    assert uses_of(job(reuse=3, ks=(2, 0, 2))) == (0, 2)
    assert uses_of(job(reuse=3, ks=())) == ()


def test_whole_sample_passes_in_any_interleaving() -> None:
    check(chunk("context", 0, 2, 32), chunk("last", 0, 2, 16), chunk("context", 2, 3, 16))


@pytest.mark.parametrize(
    ("chunks", "message"),
    [
        ([chunk("context", 0, 2, 32), chunk("last", 0, 2, 16)], "2 rows of context came, 3 are needed"),
        ([chunk("context", 0, 3, 48)], "0 rows of last came, 2 are needed"),
        ([chunk("context", 0, 4, 64), chunk("last", 0, 2, 16)], "4 rows of context came, 3 are needed"),
        ([chunk("context", 0, 2, 32), chunk("context", 1, 3, 32), chunk("last", 0, 2, 16)], "where row 2 was due"),
        ([chunk("context", 0, 1, 16), chunk("context", 2, 3, 16), chunk("last", 0, 2, 16)], "where row 1 was due"),
        ([chunk("context", 0, 3, 47), chunk("last", 0, 2, 16)], "in 47 bytes where row 0 was due at 16 bytes a row"),
    ],
)
def test_missing_doubled_or_cut_rows_are_refused(chunks: list[Chunk], message: str) -> None:
    with pytest.raises(WireError, match=message):
        check(*chunks)
