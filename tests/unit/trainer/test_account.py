from __future__ import annotations

from services.contracts import CaptureJob, Sample, SampleLease, StepLease, StepReport
from trainer.account import Account


def lease_of(use: int, incarnation: str = "a") -> SampleLease:
    job = CaptureJob(
        capture=use, attempt=3, prompt=use + 50, epoch=0, input_ids=(1, 2), loss_mask=(1, 1), last_rows=(0,)
    )
    sample = Sample(job=job, chunks=(), num_bytes=64, target="t")
    return SampleLease(lease_id=f"{incarnation}.{use}", use=use, k=0, sample=sample)


def report_of(step: int, *uses: int) -> StepReport:
    return StepReport(step=step, rank=1, generation=4, uses=uses, num_tokens=2 * len(uses))


def step_of(step: int) -> StepLease:
    return StepLease(step=step, num_micro_batches=1, num_uses=2)


def test_account_tells_what_is_granted_held_and_done():
    account = Account(1, 4)
    account.grant(step_of(1))
    account.grant(step_of(2))
    assert account.hold([lease_of(7), lease_of(8)])
    assert account.hold([lease_of(9)])
    account.report(report_of(1, 7, 8))
    told = account.answer(("b",))
    assert (told.rank, told.generation, told.incarnations) == (1, 4, ("b",))
    assert told.leases == (step_of(2),)
    assert told.reports == (report_of(1, 7, 8),)
    assert told.held == (9,)
    assert [(note.capture, note.prompt, note.attempt, note.num_bytes) for note in told.samples] == [
        (7, 57, 3, 64),
        (8, 58, 3, 64),
        (9, 59, 3, 64),
    ]


def test_samples_of_a_table_that_is_no_more_are_refused_from_the_answer_on():
    account = Account(0, 1)
    assert account.hold([lease_of(1, "a")])
    account.answer(("b",))
    assert not account.hold([lease_of(2, "a")])
    assert account.hold([lease_of(3, "b")])
    assert account.answer(("b",)).held == (1, 3)


def test_samples_of_each_table_that_counts_are_taken_and_mixed_ones_only_whole():
    account = Account(0, 1)
    account.answer(("a", "b"))
    assert account.hold([lease_of(1, "a"), lease_of(2, "b")])
    account.answer(("a", "c"))
    assert not account.hold([lease_of(3, "a"), lease_of(4, "b")])
    assert account.answer(("a", "c")).held == (1, 2)


def test_steps_are_told_back_to_the_checkpoint_before_the_newest():
    account = Account(0, 1)
    for step in range(1, 7):
        account.hold([lease_of(step)])
        account.report(report_of(step, step))
        if step % 2 == 0:
            account.saved(step)
    told = account.answer(("b",))
    assert [report.step for report in told.reports] == [5, 6]
    assert [note.capture for note in told.samples] == [5, 6]
    account.saved(6)  # again: the one before is this one too
    assert account.answer(("b",)).reports == ()
