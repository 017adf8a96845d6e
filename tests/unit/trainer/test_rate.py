import pytest

from trainer.rate import WindowedRate


def test_rate_is_the_growth_over_the_window() -> None:
    rate = WindowedRate(10.0)
    assert rate.add(0.0, 100) == 0.0
    assert rate.add(2.0, 100) == 0.0
    assert rate.add(4.0, 500) == pytest.approx(100.0)  # 400 in four seconds
    assert rate.add(12.0, 600) == pytest.approx(50.0)  # 500 since second 2
    assert rate.add(60.0, 600) == 0.0  # nothing since second 12


def test_totals_of_the_same_moment_have_no_rate() -> None:
    rate = WindowedRate(10.0)
    rate.add(1.0, 5)
    assert rate.add(1.0, 9) == 0.0


def test_total_that_falls_begins_the_window_anew() -> None:
    rate = WindowedRate(10.0)
    rate.add(0.0, 500)
    assert rate.add(2.0, 900) == pytest.approx(200.0)
    assert rate.add(4.0, 300) == 0.0
    assert rate.add(6.0, 500) == pytest.approx(100.0)
