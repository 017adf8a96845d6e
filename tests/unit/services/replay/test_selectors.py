"""The selectors: which sample a draw means, and what importance goes with it."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.replay.selectors import LEAST_PRIORITY, Choice, Ready, Selector, SelectorKind, priorities

LINE = [Ready(7, 1.0), Ready(3, 0.25), Ready(5, 0.75)]


def test_fifo_takes_the_first_whatever_the_draw() -> None:
    assert {Selector().choose(LINE, draw) for draw in (0.0, 0.5, 0.999)} == {Choice(7, 1.0)}


@pytest.mark.parametrize(("draw", "capture"), [(0.0, 7), (0.33, 7), (0.34, 3), (0.66, 3), (0.67, 5), (0.999, 5)])
def test_uniform_gives_each_an_equal_part_of_the_draw(draw: float, capture: int) -> None:
    assert Selector(SelectorKind.UNIFORM).choose(LINE, draw) == Choice(capture, 1.0)


@pytest.mark.parametrize(
    ("draw", "capture"), [(0.0, 3), (0.124, 3), (0.126, 5), (0.499, 5), (0.5, 7), (0.9999999999999999, 7)]
)
def test_prioritized_gives_each_its_weights_part_of_the_draw(draw: float, capture: int) -> None:
    assert Selector(SelectorKind.PRIORITIZED).choose(LINE, draw).capture == capture


def test_importance_undoes_the_uneven_draws() -> None:
    choices = [Selector(SelectorKind.PRIORITIZED, importance_exponent=1.0).choose(LINE, draw) for draw in (0, 0.3, 0.8)]
    assert [choice.importance for choice in choices] == [1.0, pytest.approx(1 / 3), 0.25]
    # The probability of a sample times its importance is then the same for all.
    assert [weight * choice.importance for weight, choice in zip((0.25, 0.75, 1.0), choices, strict=True)] == (
        pytest.approx([0.25] * 3)
    )
    half = Selector(SelectorKind.PRIORITIZED, importance_exponent=0.5).choose(LINE, 0.8)
    assert half.importance == pytest.approx(0.5)
    none = Selector(SelectorKind.PRIORITIZED, importance_exponent=0.0).choose(LINE, 0.8)
    assert none.importance == 1.0


def test_weight_is_the_priority_to_its_exponent() -> None:
    selector = Selector(SelectorKind.PRIORITIZED, priority_exponent=0.5)
    assert selector.weight(0.25) == 0.5
    assert Selector(SelectorKind.PRIORITIZED, priority_exponent=0.0).weight(0.01) == 1.0


def test_priority_is_the_rejection_but_never_nothing() -> None:
    assert priorities({1: 0.5, 2: 0.0, 3: 1.0}) == {1: 0.5, 2: LEAST_PRIORITY, 3: 1.0}


@pytest.mark.parametrize("rejection", [-0.1, 1.1, math.nan, math.inf])
def test_rejection_that_is_none_is_refused(rejection: float) -> None:
    with pytest.raises(ValueError, match=r"rejection .* of capture 4 must be a number from 0 to 1"):
        priorities({4: rejection})


@given(weights=st.lists(st.floats(0.01, 1), min_size=1, max_size=20), draw=st.floats(0, 1, exclude_max=True))
def test_some_sample_of_the_line_is_chosen_and_its_importance_is_at_most_one(weights: list[float], draw: float) -> None:
    line = [Ready(capture, weight) for capture, weight in enumerate(weights)]
    for kind in SelectorKind:
        choice = Selector(kind).choose(line, draw)
        assert choice.capture in range(len(line))
        assert 0 < choice.importance <= 1
