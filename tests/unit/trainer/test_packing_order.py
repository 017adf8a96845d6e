from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from trainer.packing_order import balance


def test_longest_samples_go_to_different_passes() -> None:
    """9, 7, 5, 3 in two passes of two: 9 with 3 and 7 with 5, not 9 with 7."""
    assert balance([9, 7, 5, 3], [2, 2]) == [[0, 3], [1, 2]]


def test_passes_of_one_sample_go_from_long_to_short() -> None:
    assert balance([3, 9, 5], [1, 1, 1]) == [[1], [2], [0]]


def test_samples_of_equal_length_keep_their_order() -> None:
    assert balance([4, 4, 4, 4], [1, 1, 1, 1]) == [[0], [1], [2], [3]]


def test_short_pass_stays_last_and_short() -> None:
    assert balance([100, 1, 1], [2, 1]) == [[0, 2], [1]]
    assert balance([100, 1, 1], [1, 2]) == [[1, 2], [0]]


def test_nothing_leased_gives_no_pass() -> None:
    assert balance([], []) == []
    assert balance([], [0]) == [[]]


@given(
    pass_sizes=st.lists(st.integers(0, 6), max_size=8),
    data=st.data(),
)
def test_every_sample_is_in_one_pass_and_passes_keep_their_sizes(pass_sizes: list[int], data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(1, 5000), min_size=sum(pass_sizes), max_size=sum(pass_sizes)))
    passes = balance(lengths, pass_sizes)
    assert sorted(sample for group in passes for sample in group) == list(range(len(lengths)))
    assert sorted(map(len, passes)) == sorted(pass_sizes)


@given(lengths=st.lists(st.integers(1, 5000), min_size=1, max_size=40), size=st.integers(1, 5))
def test_passes_differ_by_one_sample_at_most(lengths: list[int], size: int) -> None:
    """With equal sizes no pass has more tokens above another than its longest sample has."""
    lengths = lengths[: len(lengths) // size * size]
    sums = [sum(lengths[sample] for sample in group) for group in balance(lengths, [size] * (len(lengths) // size))]
    assert sums == sorted(sums, reverse=True)
    assert not sums or sums[0] - sums[-1] <= max(lengths)
