from __future__ import annotations

import numpy as np
import pytest
from confidence_rounds import rounds_of, simulated

from evaluation.confidence.calibration import calibration
from evaluation.confidence.fitting import GRID, fit_temperatures


def spread_logits(num_rounds: int, num_slots: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(1.0, 1.5, (num_rounds, num_slots))


def test_grid_holds_1_and_is_sorted() -> None:
    assert min(abs(np.log(GRID))) < 1e-12
    assert list(GRID) == sorted(GRID)


def test_fitted_temperatures_are_those_that_spoiled_the_logits() -> None:
    spoiled = (3.0, 0.4, 1.0)
    rounds = simulated(spread_logits(25_000, 3), temperatures=spoiled, seed=1)
    np.testing.assert_allclose(fit_temperatures(rounds), spoiled, rtol=0.15)


def test_fit_lowers_the_error_on_rounds_that_it_did_not_see() -> None:
    fitted_on = simulated(spread_logits(4000, 4, seed=2), temperatures=(3.0,) * 4, seed=3)
    judged = simulated(spread_logits(4000, 4, seed=4), temperatures=(3.0,) * 4, seed=5)
    before, after = calibration(judged), calibration(judged, fit_temperatures(fitted_on))
    assert all(later.ece < 0.5 * earlier.ece for earlier, later in zip(before, after, strict=True))


def test_first_slot_keeps_the_order_of_its_predictions() -> None:
    rounds = simulated(spread_logits(2000, 1), temperatures=(2.0,), seed=6)
    [before], [after] = calibration(rounds), calibration(rounds, fit_temperatures(rounds))
    assert after.auroc == pytest.approx(before.auroc, abs=0.01)


def test_later_slots_are_fitted_with_the_earlier_ones_as_they_were_fitted() -> None:
    """Slot 1 alone is calibrated as it is, but its product with an unmended slot 0 is not: fitted after slot 0 it
    keeps its temperature, fitted before it could not."""
    rounds = simulated(spread_logits(8000, 2, seed=7), temperatures=(4.0, 1.0), seed=8)
    first, second = fit_temperatures(rounds)
    assert first == pytest.approx(4.0, rel=0.2)
    assert second == pytest.approx(1.0, rel=0.2)


def test_slot_that_no_round_reaches_keeps_its_logits() -> None:
    rounds = rounds_of([[0.5, 0.5], [0.5, 0.5]], accepted=[1, 0], proposed=[1, 1])
    assert fit_temperatures(rounds)[1] == 1.0


def test_of_equal_errors_the_temperature_nearest_to_1_is_taken() -> None:
    # σ(0 / T) is 1/2 whatever T.
    assert fit_temperatures(rounds_of([[0.5], [0.5]], accepted=[1, 0])) == [pytest.approx(1.0)]
