"""The batching policy on queues small enough to check by hand."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from services.target.batching import Waiting, is_full, next_batch


def _queue(*lengths: int, group: str = "a") -> list[Waiting]:
    return [Waiting(length, group) for length in lengths]


def test_next_batch_empty_queue() -> None:
    assert next_batch([], max_batch_tokens=10, max_batch_samples=4) == []


def test_next_batch_counts_padding() -> None:
    # 6 + 2 tokens are 8, but padded they are 2 × 6 = 12.
    assert next_batch(_queue(6, 2), max_batch_tokens=11, max_batch_samples=4) == [0]
    assert next_batch(_queue(6, 2), max_batch_tokens=12, max_batch_samples=4) == [0, 1]


def test_next_batch_prefers_lengths_near_the_oldest() -> None:
    # Budget 20 holds two of length 10: the other 10, not the 3 that came before it.
    assert next_batch(_queue(10, 3, 10), max_batch_tokens=20, max_batch_samples=4) == [0, 2]


def test_next_batch_oldest_leads_even_if_it_exceeds_the_budget() -> None:
    assert next_batch(_queue(30, 1, 1), max_batch_tokens=20, max_batch_samples=4) == [0]


def test_next_batch_keeps_groups_apart() -> None:
    queue = [Waiting(4, "a"), Waiting(4, "b"), Waiting(4, "a")]
    assert next_batch(queue, max_batch_tokens=100, max_batch_samples=4) == [0, 2]


def test_next_batch_respects_max_samples_in_order_of_arrival() -> None:
    assert next_batch(_queue(4, 4, 4, 4), max_batch_tokens=100, max_batch_samples=3) == [0, 1, 2]


def test_is_full_when_one_is_left_out() -> None:
    assert is_full(_queue(6, 6, 6), max_batch_tokens=12, max_batch_samples=4)
    assert not is_full(_queue(6, 6), max_batch_tokens=12, max_batch_samples=4)
    assert is_full(_queue(6, 6), max_batch_tokens=100, max_batch_samples=2)


def test_is_full_other_groups_do_not_count() -> None:
    queue = [Waiting(4, "a"), Waiting(4, "b")]
    assert not is_full(queue, max_batch_tokens=100, max_batch_samples=4)


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=20),
    groups=st.lists(st.sampled_from("ab"), min_size=20, max_size=20),
    max_batch_tokens=st.integers(1, 200),
    max_batch_samples=st.integers(1, 8),
)
def test_next_batch_keeps_its_promises(
    lengths: list[int], groups: list[str], max_batch_tokens: int, max_batch_samples: int
) -> None:
    queue = [Waiting(length, group) for length, group in zip(lengths, groups, strict=False)]
    batch = next_batch(queue, max_batch_tokens=max_batch_tokens, max_batch_samples=max_batch_samples)
    assert batch[0] == 0
    assert batch == sorted(set(batch))
    assert len(batch) <= max_batch_samples
    assert {queue[i].group for i in batch} == {queue[0].group}
    assert len(batch) == 1 or len(batch) * max(queue[i].num_tokens for i in batch) <= max_batch_tokens
