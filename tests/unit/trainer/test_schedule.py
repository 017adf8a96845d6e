import math

import pytest

from trainer.schedule import learning_rate_factor, planned_steps


@pytest.mark.parametrize(
    ("num_uses", "tail", "max_steps", "expected"),
    [(21, "pad", None, 6), (21, "drop", None, 5), (20, "pad", None, 5), (21, "pad", 4, 4), (21, "drop", 9, 5)],
)
def test_planned_steps_for_tails_and_limits(num_uses: int, tail: str, max_steps: int | None, expected: int) -> None:
    assert planned_steps(num_uses, 4, tail=tail, max_steps=max_steps) == expected


def test_learning_rate_warms_up_linearly_then_falls_by_a_cosine_to_zero() -> None:
    factors = [learning_rate_factor(step, total_steps=100, warmup_fraction=0.04) for step in range(1, 101)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[51] == pytest.approx(0.5)  # step 52 is half-way from 4 to 100
    assert factors[27] == pytest.approx((1 + math.cos(math.pi / 4)) / 2)  # step 28 is a quarter of the way
    assert factors[99] == 0.0
    assert factors[3:] == sorted(factors[3:], reverse=True)


def test_learning_rate_without_warmup_starts_near_the_peak() -> None:
    assert learning_rate_factor(1, total_steps=10, warmup_fraction=0.0) == pytest.approx(
        (1 + math.cos(math.pi / 10)) / 2
    )


def test_learning_rate_beyond_the_plan_is_zero() -> None:
    assert learning_rate_factor(11, total_steps=10, warmup_fraction=0.5) == 0.0
