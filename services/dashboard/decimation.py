"""Fewer points that look the same: what a chart of a few hundred pixels can show of a long series."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def kept_rows(values: npt.NDArray[np.float64], num_buckets: int) -> npt.NDArray[np.intp]:
    """Which rows to draw: the first, last, lowest and highest of each bucket of equally many rows (M4 aggregation).

    A line through them covers the same pixels as a line through all rows, as long as a bucket is not wider than a
    pixel; no extreme is lost whatever its width.

    Args:
        values: Finite values, in the order they are drawn.
        num_buckets: At most four rows are kept for each.

    Returns:
        Row numbers, ascending; all of them where there are no more than four a bucket.
    """
    num_rows = len(values)
    if num_rows <= 4 * num_buckets:
        return np.arange(num_rows)
    width = -(-num_rows // num_buckets)
    num_used = -(-num_rows // width)
    starts = np.arange(num_used) * width
    last = np.minimum(starts + width, num_rows) - 1
    padding = num_used * width - num_rows
    lowest = starts + np.pad(values, (0, padding), constant_values=np.inf).reshape(-1, width).argmin(axis=1)
    highest = starts + np.pad(values, (0, padding), constant_values=-np.inf).reshape(-1, width).argmax(axis=1)
    return np.unique(np.concatenate([starts, last, lowest, highest]))
