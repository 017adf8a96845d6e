from __future__ import annotations

import pytest

from services.contracts import Use
from services.prompts.plan import Plan, anchor_seed


def test_numbers_follow_the_formula():
    plan = Plan(num_prompts=5, epochs=3, reuse=2, seed=1)
    assert (plan.num_captures, plan.num_uses) == (15, 30)
    assert [plan.capture(number)[1] for number in (0, 4, 5, 9, 10, 14)] == [0, 0, 1, 1, 2, 2]


def test_every_epoch_is_a_permutation_of_its_own():
    plan = Plan(num_prompts=50, epochs=3, reuse=1, seed=1)
    orders = [[plan.capture(epoch * 50 + place)[0] for place in range(50)] for epoch in range(3)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert orders[0] != orders[1] != orders[2]
    # Going back to an epoch that is no longer cached gives the same order.
    assert [plan.capture(place)[0] for place in range(50)] == orders[0]


def test_order_is_the_same_everywhere_and_follows_the_seed():
    order = [Plan(8, 1, 1, seed=42).capture(place)[0] for place in range(8)]
    assert order == [Plan(8, 1, 1, seed=42).capture(place)[0] for place in range(8)]
    assert order != [Plan(8, 1, 1, seed=43).capture(place)[0] for place in range(8)]


def test_anchor_seed_depends_on_the_use_and_the_seed_alone():
    use = Use(prompt=3, epoch=1, k=0)
    assert anchor_seed(7, use) == 8639678153866238814  # a run resumed by a later version draws the same
    others = [anchor_seed(7, Use(prompt=p, epoch=e, k=k)) for p in range(5) for e in range(5) for k in range(5)]
    assert len({anchor_seed(8, use), *others}) == 126
    assert all(0 <= seed < 2**63 for seed in others)


@pytest.mark.parametrize(
    ("arguments", "name"), [((0, 1, 1), "num_prompts"), ((1, 0, 1), "epochs"), ((1, 1, 0), "reuse")]
)
def test_empty_plan_is_refused(arguments, name):
    with pytest.raises(ValueError, match=f"{name} of at least 1, not 0"):
        Plan(*arguments, seed=0)


def test_capture_outside_the_plan_is_refused():
    with pytest.raises(IndexError, match="capture 15 is outside the plan's 15"):
        Plan(5, 3, 2, seed=0).capture(15)
