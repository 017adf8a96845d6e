from __future__ import annotations

from typing import Any

import pytest

from evaluation.bench.overhead import Overhead, Turn, compare, measure_emit
from services.errors import SlipstreamError


def step(end_s: float, step_s: float, tokens: int = 100) -> dict[str, Any]:
    return {"kind": "step", "time_s": end_s, "step_s": step_s, "tokens": tokens}


def turns(num_pairs: int) -> list[Turn]:
    """Ten seconds each, from 0 on: with, without, without, with, …"""
    watched = [order for pair in range(num_pairs) for order in ((True, False) if pair % 2 == 0 else (False, True))]
    return [Turn(10.0 * number, 10.0 * number + 10, is_watched) for number, is_watched in enumerate(watched)]


def test_neighbouring_turns_are_compared_by_time_a_token() -> None:
    # Watched 1.0 s a hundred tokens, 1.1 in the last pair; unwatched 1.0. A step twice as large takes twice as long.
    ends = [turn.begin_s + 5 for turn in turns(5)]
    watched = [turn.is_watched for turn in turns(5)]
    steps = [
        step(end, (2.2 if number >= 8 else 2.0) if is_watched else 1.0, 200 if is_watched else 100)
        for number, (end, is_watched) in enumerate(zip(ends, watched, strict=True))
    ]
    result = compare(steps, turns(5), emit_s=0.001, num_events=7)
    assert result.ratio == pytest.approx(1.0)
    assert result.interval[0] == pytest.approx(1.0)
    assert result.interval[1] == pytest.approx(1.1)
    assert (result.num_pairs, result.num_steps) == (5, 10)
    assert (result.watched_step_s, result.unwatched_step_s) == (2.0, 1.0)
    assert result.emit_fraction == pytest.approx(0.001)
    assert result.as_json()["num_events"] == 7


def test_slower_steps_while_watched_show() -> None:
    steps = [step(turn.begin_s + 5, 1.5 if turn.is_watched else 1.0) for turn in turns(6)]
    result = compare(steps, turns(6), emit_s=0.0, num_events=1)
    assert result.ratio == pytest.approx(1.5)
    assert result.interval == pytest.approx((1.5, 1.5))


def test_step_that_a_switch_cuts_counts_for_neither_turn() -> None:
    whole = [step(turn.begin_s + 5, 1.0) for turn in turns(4)]
    cut = [step(turn.begin_s + 0.5, 9.0) for turn in turns(4)]
    result = compare(whole + cut, turns(4), emit_s=0.0, num_events=1)
    assert (result.ratio, result.num_steps) == (1.0, 8)


def test_too_few_pairs_with_steps_are_refused() -> None:
    steps = [step(turn.begin_s + 5, 1.0) for turn in turns(4)[:-1]]
    with pytest.raises(SlipstreamError, match="only 3 of 4 pairs"):
        compare(steps, turns(4), emit_s=0.0, num_events=1)


def test_emit_is_measured_against_a_real_redis() -> None:
    assert measure_emit() > 0


def test_result_is_one_object_with_the_hardware() -> None:
    result = Overhead(1.01, (0.99, 1.02), 0.2, 0.2, 8, 400, 0.0001, 90)
    assert result.as_json().keys() == {
        *("ratio", "interval", "watched_step_s", "unwatched_step_s", "num_pairs", "num_steps", "emit_s", "num_events"),
        *("emit_fraction", "hardware"),
    }
