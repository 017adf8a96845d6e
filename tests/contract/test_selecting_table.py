"""Selectors and priorities in every table."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from replaying import SIGNATURE, MakeReplay, captures_of, insert, lease, make_job

from services.replay.protocol import ReplayTable
from services.replay.selectors import LEAST_PRIORITY, Selector, SelectorKind

PRIORITIZED = Selector(SelectorKind.PRIORITIZED, priority_exponent=0.5, importance_exponent=1.0)
NUM_DRAWS = 400


def selecting(make_replay: MakeReplay, selector: Selector, *, reuse: int = 2, num_samples: int = 4) -> ReplayTable:
    table = make_replay().table
    table.create(100_000, SIGNATURE, reuse, selector=selector)
    for capture in range(num_samples):
        insert(table, make_job(capture, reuse=reuse))
    return table


def draw_often(table: ReplayTable) -> Counter[int]:
    counts: Counter[int] = Counter()
    for _ in range(NUM_DRAWS):
        leases = lease(table)
        counts.update(captures_of(leases))
        table.release(leases, 0)
    return counts


def is_near(count: int, probability: float) -> bool:
    """Within five standard deviations."""
    return abs(count - NUM_DRAWS * probability) < 5 * math.sqrt(NUM_DRAWS * probability * (1 - probability))


def test_uniform_draws_all_ready_samples_alike(make_replay: MakeReplay) -> None:
    counts = draw_often(selecting(make_replay, Selector(SelectorKind.UNIFORM)))
    assert sorted(counts) == [0, 1, 2, 3]
    assert all(is_near(count, 0.25) for count in counts.values())


def test_uniform_gives_each_use_once(make_replay: MakeReplay) -> None:
    table = selecting(make_replay, Selector(SelectorKind.UNIFORM), reuse=3)
    uses = [item.use for _ in range(4) for item in lease(table, 3)]
    assert sorted(uses) == list(range(12))
    assert uses != sorted(uses)
    assert lease(table) == []


def test_prioritized_draws_new_samples_alike_and_leaves_their_loss(make_replay: MakeReplay) -> None:
    table = selecting(make_replay, PRIORITIZED)
    assert all(is_near(count, 0.25) for count in draw_often(table).values())
    assert lease(table)[0].importance == 1.0


def test_prioritized_draws_by_rejection_and_importance_undoes_it(make_replay: MakeReplay) -> None:
    table = selecting(make_replay, PRIORITIZED, num_samples=3)
    assert table.update_priorities({0: 0.04, 1: 0.64}) == 2  # weights 0.2, 0.8 and 1 of the new one
    counts = draw_often(table)
    for capture, weight in enumerate((0.2, 0.8, 1.0)):
        assert is_near(counts[capture], weight / 2.0)
    importances = {captures_of([item])[0]: item.importance for item in lease(table, 6)}
    assert set(importances) == {0, 1, 2}


def test_importance_is_relative_to_the_least_weight_in_line(make_replay: MakeReplay) -> None:
    table = selecting(make_replay, PRIORITIZED, reuse=1, num_samples=3)
    table.update_priorities({0: 0.04, 1: 0.64})
    weights = {0: 0.2, 1: 0.8, 2: 1.0}
    for _ in range(3):
        ((capture, importance),) = [(captures_of([item])[0], item.importance) for item in lease(table)]
        assert importance == pytest.approx(min(weights.values()) / weights.pop(capture))


def test_same_draws_choose_the_same_samples(make_replay: MakeReplay) -> None:
    chosen = []
    for seed in (5, 5, 6):
        table = make_replay(seed).table
        table.create(100_000, SIGNATURE, 2, selector=PRIORITIZED)
        for capture in range(20):
            insert(table, make_job(capture, reuse=2))
        table.update_priorities({capture: capture / 20 for capture in range(20)})
        chosen.append(captures_of(lease(table, 8)))
    assert chosen[0] == chosen[1] != chosen[2]


@pytest.mark.parametrize("kind", [SelectorKind.UNIFORM, SelectorKind.PRIORITIZED])
def test_draw_at_a_bound_means_the_sample_after_it(make_replay: MakeReplay, kind: SelectorKind) -> None:
    table = make_replay(draw=lambda: 0.5).table
    table.create(100_000, SIGNATURE, 1, selector=Selector(kind))
    for capture in range(4):
        insert(table, make_job(capture))
    assert captures_of(lease(table)) == [2]


def test_priority_can_be_said_again_and_is_the_newest(make_replay: MakeReplay) -> None:
    table = selecting(make_replay, PRIORITIZED, num_samples=2)
    before = table.info()
    for rejections in ({0: 0.9}, {0: 0.0}, {0: 0.0}):
        assert table.update_priorities(rejections) == 1
    assert table.info() == before
    counts = draw_often(table)
    weight = math.sqrt(LEAST_PRIORITY)
    assert is_near(counts[0], weight / (1 + weight))


def test_priority_of_what_is_not_here_is_passed_over(make_replay: MakeReplay) -> None:
    table = selecting(make_replay, PRIORITIZED, reuse=1, num_samples=2)
    table.admit(make_job(8), 56, 0.0)
    leases = lease(table)
    table.ack(leases, 0, 0.0)
    used_up = captures_of(leases)[0]
    assert table.update_priorities({used_up: 0.5, 8: 0.5, 77: 0.5, 1 - used_up: 0.5}) == 1
    assert table.update_priorities({}) == 0
    assert captures_of(lease(table)) == [1 - used_up]


def test_priority_of_a_leased_sample_holds_once_it_is_back(make_replay: MakeReplay) -> None:
    table = selecting(make_replay, PRIORITIZED, reuse=1, num_samples=1)
    held = lease(table)
    assert table.update_priorities({0: 0.25}) == 1
    insert(table, make_job(1))
    table.release(held, 0)
    importances = {captures_of([item])[0]: item.importance for item in lease(table, 2)}
    assert importances[0] == 1.0
    assert importances[1] in (0.5, 1.0), "1 if it was drawn last, alone in line"


@pytest.mark.parametrize("rejection", [math.nan, -0.5, 1.5])
def test_rejection_that_is_none_changes_nothing(make_replay: MakeReplay, rejection: float) -> None:
    table = selecting(make_replay, PRIORITIZED, num_samples=2)
    with pytest.raises(ValueError, match="rejection"):
        table.update_priorities({0: 0.1, 1: rejection})
    assert lease(table)[0].importance == 1.0


def test_fifo_ignores_priorities(make_replay: MakeReplay) -> None:
    table = selecting(make_replay, Selector(), num_samples=3)
    assert table.update_priorities({0: 0.01, 2: 0.9}) == 2
    leases = lease(table, 6)
    assert captures_of(leases) == [0, 1, 2, 0, 1, 2]
    assert {item.importance for item in leases} == {1.0}


def test_new_generation_keeps_priorities(make_replay: MakeReplay) -> None:
    table = selecting(make_replay, PRIORITIZED, num_samples=2)
    table.update_priorities({0: 0.0})
    lease(table, 2)
    table.set_generation(1)
    weight = math.sqrt(LEAST_PRIORITY)
    importances = {captures_of([item])[0]: item.importance for item in lease(table, 1, generation=1)}
    assert importances in ({0: 1.0}, {1: pytest.approx(weight)})
