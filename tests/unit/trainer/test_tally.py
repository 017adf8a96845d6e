import pytest

from services.contracts import CaptureJob, Sample, SampleLease
from trainer.tally import StepTally


def lease(use: int) -> SampleLease:
    job = CaptureJob(capture=use, prompt=0, epoch=0, input_ids=(), loss_mask=(), last_rows=())
    return SampleLease(lease_id=str(use), use=use, k=0, sample=Sample(job=job, chunks=(), num_bytes=0, target=""))


def test_figures_of_two_ranks_are_weighted_by_samples() -> None:
    # Micro-batch 1: rank 0 has two samples, rank 1 one. Micro-batch 2: rank 0 has none, rank 1 one.
    first, second = StepTally(0, 2), StepTally(1, 2)
    for tally, micro_batches in ((first, [[4, 7], []]), (second, [[5], [6]])):
        for loss, uses in zip((1.0, 3.0), micro_batches, strict=True):
            tally.add({"loss": loss}, [lease(use) for use in uses], 10 * len(uses))
    total = [
        a + b for a, b in zip(first.vector(wait_s=0.25, step_s=2.0), second.vector(wait_s=0.5, step_s=1.0), strict=True)
    ]
    for tally in (first, second):
        figures = tally.figures(total)
        assert figures.metrics == {"loss": pytest.approx((1.0 * 3 + 3.0 * 1) / 4)}
        assert (figures.num_samples, figures.num_tokens) == (4, 40)
        assert (figures.wait_s, figures.step_s) == (0.5, 2.0)
    assert first.uses == [4, 7]
    assert second.num_tokens == 20


def test_step_of_padding_alone_has_no_metrics() -> None:
    tally = StepTally(0, 1)
    tally.add({"loss": 0.0}, [], 0)
    figures = tally.figures(tally.vector(wait_s=0.0, step_s=1.0))
    assert figures.metrics == {}
    assert figures.num_samples == 0
