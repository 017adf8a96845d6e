from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from services.dashboard.decimation import kept_rows


def test_short_series_are_kept_whole() -> None:
    assert kept_rows(np.arange(8.0), 2).tolist() == list(range(8))


def test_each_bucket_keeps_its_first_last_lowest_and_highest() -> None:
    # Two buckets of five: first 0, last 4, low 2, high 3; first 5, last 9, low 8, high 6.
    values = np.array([3.0, 4.0, 1.0, 9.0, 5.0, 6.0, 8.0, 7.0, 2.0, 4.0])
    assert kept_rows(values, 2).tolist() == [0, 2, 3, 4, 5, 6, 8, 9]


def test_last_bucket_may_be_shorter() -> None:
    values = np.zeros(9)
    values[8] = -1.0
    assert kept_rows(values, 2).tolist() == [0, 4, 5, 8]


@given(arrays(np.float64, st.integers(0, 300), elements=st.floats(-1e9, 1e9)), st.integers(1, 20))
def test_no_extreme_and_neither_end_is_lost(values: np.ndarray, num_buckets: int) -> None:
    rows = kept_rows(values, num_buckets)
    assert len(rows) <= max(4 * num_buckets, 0)
    assert np.all(np.diff(rows) > 0)
    if len(values):
        assert (rows[0], rows[-1]) == (0, len(values) - 1)
        assert values[rows].min() == values.min()
        assert values[rows].max() == values.max()
    width = max(1, -(-len(values) // num_buckets))
    for first in range(0, len(values), width):
        bucket, kept = values[first : first + width], rows[(rows >= first) & (rows < first + width)]
        assert values[kept].min() == bucket.min()
        assert values[kept].max() == bucket.max()
