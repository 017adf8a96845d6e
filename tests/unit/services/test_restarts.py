from __future__ import annotations

from services.restarts import RestartBudget


def test_restarts_are_counted_within_the_window_alone() -> None:
    budget = RestartBudget(most=2, window_s=10.0)
    assert budget.spend(0.0) == 1
    assert budget.spend(9.0) == 2
    assert budget.spend(10.0) == 2, "the first one is as old as the window"
    assert budget.spend(11.0) is None
    assert budget.spend(100.0) == 1
