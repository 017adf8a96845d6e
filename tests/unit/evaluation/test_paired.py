from __future__ import annotations

import random

import pytest

from evaluation.compare.paired import paired_difference
from evaluation.metrics import bootstrap_interval

EASY, HARD = [6] * 10, [2] * 10


def spread(num_prompts: int, lead: int) -> list[list[int]]:
    """Prompts from hard to easy; `lead` tokens more in one round of each."""
    return [[2 + 4 * index // num_prompts] * 9 + [2 + 4 * index // num_prompts + lead] for index in range(num_prompts)]


def test_drafter_that_leads_on_every_prompt_is_told_apart_though_the_intervals_overlap():
    ahead, behind = spread(24, lead=3), spread(24, lead=0)
    low, _ = bootstrap_interval(ahead, seed=7)
    _, high = bootstrap_interval(behind, seed=7)
    assert low < high
    found = paired_difference(ahead, behind, seed=7)
    assert found.difference == pytest.approx(0.3)
    assert found.low == pytest.approx(0.3)
    assert found.high == pytest.approx(0.3)
    assert found.is_clear


def test_lead_that_varies_by_prompt_keeps_an_interval_above_zero():
    generator = random.Random(5)
    behind = spread(40, lead=0)
    ahead = [[tokens + generator.choice((0, 0, 1)) for tokens in rounds] for rounds in behind]
    assert bootstrap_interval(ahead, seed=7)[0] < bootstrap_interval(behind, seed=7)[1]
    found = paired_difference(ahead, behind, seed=7)
    assert 0 < found.low < found.difference < found.high
    assert found.is_clear


def test_drafters_that_take_turns_in_leading_are_not_told_apart():
    first, second = [EASY, HARD] * 8, [HARD, EASY] * 8
    found = paired_difference(first, second, seed=7)
    assert found.difference == 0
    assert found.low < 0 < found.high
    assert not found.is_clear


def test_difference_is_of_sums_over_sums():
    found = paired_difference([[4, 2], [1]], [[3], [1, 1, 1]], seed=7)
    assert found.difference == pytest.approx(7 / 3 - 6 / 4)
    assert found.num_prompts == 2


def test_exchanging_the_drafters_turns_the_interval_round():
    first, second = spread(12, lead=1)[::-1], spread(12, lead=0)
    there, back = paired_difference(first, second, seed=3), paired_difference(second, first, seed=3)
    assert (back.low, back.high) == pytest.approx((-there.high, -there.low))
    assert there != paired_difference(first, second, seed=4)


def test_wider_level_gives_a_wider_interval():
    first, second = [EASY, HARD] * 8, [HARD, EASY] * 8
    narrow, wide = (paired_difference(first, second, seed=7, level=level) for level in (0.5, 0.99))
    assert wide.low < narrow.low < narrow.high < wide.high


def test_prompt_without_rounds_of_one_side_is_left_out():
    found = paired_difference([[4], [], [2]], [[3], [9], [1]], seed=7)
    assert found.num_prompts == 2
    assert (found.difference, found.low, found.high) == (1, 1, 1)


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [([[1]], [[1], [2]], "1 prompts of the one and 2 of the other"), ([[], [1]], [[1], []], "rounds of both")],
)
def test_what_is_no_pairs_is_refused(first, second, words):
    with pytest.raises(ValueError, match=words):
        paired_difference(first, second, seed=7)
