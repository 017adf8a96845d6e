import pytest

from evaluation.report import Divergence, summarize


def divergence(sample, *, within_rounding):
    return Divergence(
        sample=sample,
        position=4,
        target_token=1,
        our_token=2,
        top2_gap=0.01,
        token_gap=0.01,
        within_rounding=within_rounding,
    )


def report(divergences):
    # two samples, γ = 2: rounds of (2 drafts, 1 kept, 2 committed), (2, 2, 3) and (1, 0, 1)
    return summarize(
        [[2, 3], [1]],
        [[2, 2], [1]],
        [[1, 2], [0]],
        label="step_7",
        checkpoint="run/step_7",
        temperature=0.0,
        seed=1,
        num_tokens=8,
        seconds=0.5,
        divergences=divergences,
    )


def test_figures_of_all_rounds():
    found = report([])
    assert found.accepted_length == 2.0
    assert found.interval == (1.0, 2.5)
    assert found.accept_rate == (2 / 3, 1 / 2)
    assert found.cond_accept_rate == (2 / 3, 1 / 2)
    assert found.draft_tokens_per_proposal == 5 / 3
    assert found.verify_rate == 6 / 8
    assert (found.num_samples, found.num_rounds, found.num_tokens) == (2, 3, 8)


def test_output_without_divergence_is_lossless():
    found = report([])
    assert found.lossless is True
    assert found.first_divergence is None


def test_unchecked_output_claims_nothing():
    assert report(None).lossless is None


def test_divergence_within_rounding_is_reported_but_lossless():
    found = report([divergence(1, within_rounding=True)])
    assert found.lossless is True
    assert found.first_divergence.sample == 1


def test_real_divergence_is_reported_before_rounding():
    found = report([divergence(0, within_rounding=True), divergence(1, within_rounding=False)])
    assert found.lossless is False
    assert found.first_divergence.sample == 1


def test_no_round_is_refused():
    with pytest.raises(ValueError, match="no round was decoded"):
        summarize(
            [[]],
            [[]],
            [[]],
            label="",
            checkpoint="",
            temperature=0.0,
            seed=0,
            num_tokens=1,
            seconds=0.1,
            divergences=None,
        )
