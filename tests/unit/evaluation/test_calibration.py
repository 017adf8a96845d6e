from __future__ import annotations

import numpy as np
import pytest
from confidence_rounds import rounds_of

from evaluation.confidence.calibration import (
    auroc,
    bin_of,
    brier,
    calibration,
    expected_calibration_error,
    reliability,
)

PREDICTED = np.array([0.11, 0.13, 0.52, 0.54, 0.93])
SURVIVED = np.array([False, True, True, False, True])


def test_ece_weighs_bins_by_their_predictions() -> None:
    # Bins of a twentieth: {0.11, 0.13} 0.12 against 1/2, {0.52, 0.54} 0.53 against 1/2, {0.93} against 1.
    expected = (2 * 0.38 + 2 * 0.03 + 1 * 0.07) / 5
    assert expected_calibration_error(PREDICTED, SURVIVED) == pytest.approx(expected)


def test_ece_of_opposite_errors_in_one_bin_is_zero() -> None:
    assert expected_calibration_error(np.array([0.5, 0.5]), np.array([True, False])) == pytest.approx(0.0)
    # Two bins instead of one would tell them apart.
    assert expected_calibration_error(np.array([0.49, 0.51]), np.array([True, False])) == pytest.approx(0.51)


def test_brier_is_the_mean_squared_error() -> None:
    expected = (0.11**2 + 0.87**2 + 0.48**2 + 0.54**2 + 0.07**2) / 5
    assert brier(PREDICTED, SURVIVED) == pytest.approx(expected)


def test_auroc_counts_pairs_in_order_and_ties_half() -> None:
    # Survivors 0.13, 0.52, 0.93 against 0.11 and 0.54: 4 of 6 pairs in order.
    assert auroc(PREDICTED, SURVIVED) == pytest.approx(4 / 6)
    # In one of a thousand bins, so equal.
    assert auroc(np.array([0.5001, 0.5002]), np.array([True, False])) == pytest.approx(0.5)
    assert auroc(np.array([0.5005, 0.5015]), np.array([True, False])) == pytest.approx(0.0)


@pytest.mark.parametrize("outcome", [True, False])
def test_auroc_of_equal_outcomes_is_none(outcome: bool) -> None:
    assert auroc(PREDICTED, np.full(5, outcome)) is None


def test_auroc_equals_all_pairs_counted() -> None:
    generator = np.random.default_rng(3)
    predicted = generator.integers(0, 1000, 300) / 1000 + 0.0005
    survived = generator.random(300) < predicted
    higher, lower = predicted[survived][:, None], predicted[~survived][None, :]
    pairs = (higher > lower).mean() + (higher == lower).mean() / 2
    assert auroc(predicted, survived) == pytest.approx(pairs)


def test_bins_are_closed_to_the_left_and_one_is_in_the_last() -> None:
    assert bin_of(np.array([0.0, 0.0499, 0.05, 0.5, 1 - 1e-8, 1.0]), 20).tolist() == [0, 0, 1, 10, 19, 19]


def test_reliability_has_a_bin_only_where_there_are_predictions() -> None:
    bins = reliability(PREDICTED, SURVIVED)
    assert [number for number, found in enumerate(bins) if found] == [2, 10, 18]
    assert bins[2] is not None
    assert (bins[2].count, bins[2].predicted, bins[2].observed) == (2, pytest.approx(0.12), pytest.approx(0.5))


def test_slots_past_the_recorded_proposal_are_not_judged() -> None:
    rounds = rounds_of([[0.8, 0.5, 0.5], [0.6, 0.5, 0.5]], accepted=[2, 0], proposed=[2, 1])
    first, second = calibration(rounds)
    assert (first.position, first.num_rounds) == (0, 2)
    assert first.predicted == pytest.approx(0.7)
    assert first.observed == pytest.approx(0.5)
    assert first.brier == pytest.approx((0.2**2 + 0.6**2) / 2)
    assert (second.position, second.num_rounds) == (1, 1)
    # The cumulative product, not the slot's own confidence.
    assert second.predicted == pytest.approx(0.4)
    assert second.observed == 1.0
    assert second.auroc is None


def test_certain_predictions_are_clamped() -> None:
    rounds = rounds_of([[0.5]], accepted=[0])
    rounds.logits[:] = 1e6
    [slot] = calibration(rounds)
    assert slot.predicted == 1 - 1e-8
