import pytest

from services.contracts import CaptureJob, Sample, SampleLease
from trainer.figures import RunFigures, StepFigures, StepTally


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


def test_ranks_with_losses_of_their_own_are_weighted_by_samples() -> None:
    # Deterministic mode: rank 0 has the loss of three samples, rank 1 another one of a single sample.
    first, second = StepTally(0, 2), StepTally(1, 2)
    first.add({"loss": 1.0, "ce_loss": 2.0}, [lease(0), lease(1), lease(2)], 30)
    second.add({"loss": 5.0, "ce_loss": 4.0}, [lease(3)], 10)
    vectors = [tally.vector(wait_s=0.0, step_s=1.0) for tally in (first, second)]
    total = [a + b for a, b in zip(*vectors, strict=True)]
    assert first.figures(total).metrics == {"loss": 2.0, "ce_loss": 2.5}
    assert second.figures(total) == first.figures(total)


def test_step_of_padding_alone_has_no_metrics() -> None:
    tally = StepTally(0, 1)
    tally.add({"loss": 0.0}, [], 0)
    figures = tally.figures(tally.vector(wait_s=0.0, step_s=1.0))
    assert figures.metrics == {}
    assert figures.num_samples == 0


def step(loss: float, *, wait_s: float = 0.0) -> StepFigures:
    return StepFigures(metrics={"loss": loss}, num_samples=1, num_tokens=5, wait_s=wait_s, step_s=2.0)


def test_wait_fraction_leaves_the_first_fill_out() -> None:
    run = RunFigures()
    run.add(step(1.0, wait_s=1.9))
    assert run.wait_fraction is None
    run.add(step(1.0, wait_s=0.5))
    run.add(step(1.0, wait_s=0.3))
    assert run.wait_fraction == pytest.approx(0.8 / 4.0)
    result = run.result(steps=13)
    assert (result.first_step, result.steps, result.tokens, result.first_fill_s) == (11, 13, 15, 1.9)


def test_final_loss_is_the_mean_of_the_last_ten_steps_across_a_resume() -> None:
    before = RunFigures()
    for loss in range(12):
        before.add(step(float(loss)))
    resumed = RunFigures(before.last_losses)
    assert resumed.result(steps=12).final_loss == pytest.approx(sum(range(2, 12)) / 10), "a finished run, started again"
    resumed.add(step(20.0))
    assert resumed.result(steps=13).final_loss == pytest.approx((sum(range(3, 12)) + 20) / 10)


def test_run_without_any_step_has_no_loss() -> None:
    result = RunFigures().result(steps=0)
    assert (result.first_step, result.final_loss, result.wait_fraction) == (1, None, None)
