import pytest

from evaluation import metrics

# Two samples, γ = 3. Rounds as (proposed, accepted drafts, committed); the last round of the second sample ended in a
# drafted stop token, so it has no bonus token.
PROPOSED = [[3, 3, 1], [0, 2]]
ACCEPTED = [[3, 1, 0], [0, 2]]
COMMITTED = [[4, 2, 1], [1, 2]]


def test_accepted_length_is_tokens_over_rounds():
    assert metrics.accepted_length(COMMITTED) == 10 / 5


def test_draft_tokens_per_proposal_counts_empty_proposals():
    assert metrics.draft_tokens_per_proposal(PROPOSED) == 9 / 5


def test_verify_rate_is_committed_over_verified_rows():
    assert metrics.verify_rate(COMMITTED, PROPOSED) == 10 / (9 + 5)


def test_accept_rate_divides_by_proposals_that_reach_the_slot():
    # slot 0: of 4 proposals 3 accepted; slot 1: of 3, 2; slot 2: of 2, 1
    assert metrics.accept_rate(ACCEPTED, PROPOSED) == [3 / 4, 2 / 3, 1 / 2]


def test_conditional_accept_rate_divides_by_rounds_that_got_there():
    # slot 1: 3 proposals reach it with slot 0 accepted; slot 2: only the first round got there
    assert metrics.cond_accept_rate(ACCEPTED, PROPOSED) == [3 / 4, 2 / 3, 1.0]


def test_conditional_accept_rate_is_none_where_no_round_got():
    assert metrics.cond_accept_rate([[0, 0]], [[3, 3]]) == [0.0, None, None]


def test_rates_are_empty_without_proposals():
    assert metrics.accept_rate([[0]], [[0]]) == []
    assert metrics.cond_accept_rate([[0]], [[0]]) == []


def test_interval_collapses_when_samples_agree():
    assert metrics.bootstrap_interval([[2, 2], [2], []], seed=1) == (2.0, 2.0)


def test_interval_of_two_samples_spans_both():
    # A quarter of the resamples hold only one of the two: the 2.5 % and 97.5 % quantiles are the extremes.
    assert metrics.bootstrap_interval([[1, 1], [3, 3]], seed=1) == (1.0, 3.0)


def test_interval_weighs_samples_by_their_rounds():
    # Σ/Σ of any resample that holds both is (a + 9b) / (a·1 + b·9): never the mean of the samples' own τ.
    low, high = metrics.bootstrap_interval([[10]] + [[1] * 9] * 19, seed=1)
    # k of 20 draws are the long sample: τ = (10k + 9(20 − k)) / (k + 9(20 − k)); k = 0 → 1, k = 3 → 183 / 156
    assert low == 1.0
    assert high == pytest.approx(183 / 156)


def test_interval_is_the_same_for_the_same_seed():
    rounds = [[1, 2], [3], [2, 2, 4], [1]]
    assert metrics.bootstrap_interval(rounds, seed=5) == metrics.bootstrap_interval(rounds, seed=5)


@pytest.mark.parametrize(
    "figure",
    [
        lambda: metrics.accepted_length([[]]),
        lambda: metrics.draft_tokens_per_proposal([[]]),
        lambda: metrics.verify_rate([[]], [[]]),
        lambda: metrics.bootstrap_interval([[]], seed=0),
    ],
)
def test_figures_without_a_round_are_refused(figure):
    with pytest.raises(ValueError, match="no round was decoded"):
        figure()
