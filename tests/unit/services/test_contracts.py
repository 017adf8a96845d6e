from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from services.contracts import (
    DTYPE_BYTES,
    CaptureJob,
    Chunk,
    Generation,
    LastRows,
    Outcome,
    Sample,
    SampleLease,
    StepLease,
    StepReport,
    TableSignature,
)

SIGNATURE = TableSignature(fingerprint="f", layer_ids=(1, 9, 17, 25, 33), hidden_size=2560, dtype="bf16")
JOB = CaptureJob(capture=3, prompt=7, epoch=1, input_ids=(5, 6, 7), loss_mask=(0, 1, 1), last_rows=(1,))
SAMPLE = Sample(
    job=JOB,
    chunks=(
        Chunk(tensor="context", row_start=0, row_end=3, num_bytes=76_800, crc32c=0xFFFFFFFF),
        Chunk(tensor="last", row_start=0, row_end=1, num_bytes=5_120, crc32c=1),
    ),
    num_bytes=81_920,
    target="127.0.0.1:50051",
)


@pytest.mark.parametrize(
    ("loss_mask", "between", "after"),
    [
        ((), [], []),
        ((1,), [], []),
        ((0, 0, 0), [], []),
        ((0, 1, 1, 1, 0), [1, 2], [2, 3, 4]),
        ((0, 1, 0, 1, 1), [3], [2, 4]),
        ((1, 1, 1), [0, 1], [1, 2]),
        ((0, 0, 1), [], []),  # the row after the last token does not exist
    ],
)
def test_last_rows_are_those_the_loss_reads(loss_mask: tuple[int, ...], between: list[int], after: list[int]) -> None:
    assert LastRows.BETWEEN.select(loss_mask) == between
    assert LastRows.AFTER.select(loss_mask) == after


@given(st.lists(st.integers(0, 1), max_size=40))
def test_last_rows_ascend_within_the_sequence(loss_mask: list[int]) -> None:
    for rule in LastRows:
        rows = rule.select(loss_mask)
        assert rows == sorted(set(rows))
        assert all(0 <= row < len(loss_mask) for row in rows)


def test_sample_bytes_are_those_of_the_tensors() -> None:
    # Qwen3-4B: five layers and the last hidden state of 2560 two-byte numbers.
    assert SIGNATURE.context_row_bytes == 5 * 2560 * 2 == 25_600
    assert SIGNATURE.last_row_bytes == 2560 * 2 == 5_120
    assert SIGNATURE.sample_bytes(1024, 1024) == 31_457_280
    assert SIGNATURE.sample_bytes(1000, 10) == 25_600_000 + 51_200
    assert SIGNATURE.sample_bytes(0, 0) == 0


def test_sample_bytes_follow_the_wire_dtype() -> None:
    wide = SIGNATURE.model_copy(update={"dtype": "fp32"})
    assert wide.sample_bytes(3, 2) == 2 * SIGNATURE.sample_bytes(3, 2)
    assert DTYPE_BYTES == {"bf16": 2, "fp16": 2, "fp32": 4, "fp8_e4m3": 1}


def test_rows_of_fp8_have_a_scale_a_hidden_state() -> None:
    fp8 = SIGNATURE.model_copy(update={"dtype": "fp8_e4m3"})
    assert fp8.last_row_bytes == 2560 + 4
    assert fp8.context_row_bytes == 5 * (2560 + 4)
    assert fp8.sample_bytes(10, 3) == 10 * 12_820 + 3 * 2_564


def test_job_counts_its_tokens() -> None:
    assert JOB.num_tokens == 3
    assert JOB.attempt == 0
    assert JOB.reuse == 1


@pytest.mark.parametrize(
    "record",
    [
        SIGNATURE,
        JOB,
        SAMPLE,
        SampleLease(lease_id="a:1", use=6, k=0, sample=SAMPLE),
        StepLease(step=4, num_micro_batches=2, captures=(((1, 2), (3,)), ((4, 5), (6,)))),
        StepReport(step=4, rank=0, generation=2, uses=(6, 9), num_tokens=12, metrics={"loss": 0.5}),
        Outcome(capture=3, attempt=1, kind="failed", retry=True, reason="target gone"),
    ],
    ids=lambda record: type(record).__name__,
)
def test_record_survives_json(record: SampleLease) -> None:
    assert type(record).model_validate_json(record.model_dump_json()) == record


def test_record_is_immutable() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        JOB.attempt = 1  # type: ignore[misc]


def test_record_refuses_a_field_it_does_not_know() -> None:
    with pytest.raises(ValidationError, match="payload"):
        Chunk.model_validate({**SAMPLE.chunks[0].model_dump(), "payload": b"tensor bytes never travel in a record"})


@pytest.mark.parametrize(("field", "value"), [("tensor", "logits"), ("crc32c", "zero"), ("num_bytes", None)])
def test_chunk_refuses_a_value_of_the_wrong_kind(field: str, value: object) -> None:
    with pytest.raises(ValidationError, match=field):
        Chunk.model_validate({**SAMPLE.chunks[0].model_dump(), field: value})


def test_step_lease_without_micro_batches_is_the_end() -> None:
    assert StepLease(step=9, num_micro_batches=0).is_end
    assert not StepLease(step=8, num_micro_batches=1).is_end


GENERATION = Generation(max_new_tokens=10, stop_token_ids=(2,), last_rows=LastRows.BETWEEN)
QUESTION = CaptureJob(
    capture=3, prompt=7, epoch=1, input_ids=(5, 6), loss_mask=(0, 0), last_rows=(), generate=GENERATION
)


def test_answered_job_is_what_it_would_be_with_a_known_answer():
    known = CaptureJob(
        capture=3, prompt=7, epoch=1, input_ids=(5, 6, 8, 9, 2), loss_mask=(0, 0, 1, 1, 1), last_rows=(2, 3)
    )
    assert QUESTION.answered([8, 9, 2]) == known


def test_reserved_bytes_hold_the_longest_answer():
    assert SIGNATURE.reserved_bytes(QUESTION) == SIGNATURE.sample_bytes(12, 10)
    assert SIGNATURE.reserved_bytes(JOB) == SIGNATURE.sample_bytes(3, 1)
    assert all(
        SIGNATURE.sample_bytes((job := QUESTION.answered([4] * n)).num_tokens, len(job.last_rows))
        <= SIGNATURE.reserved_bytes(QUESTION)
        for n in range(1, 11)
    )
