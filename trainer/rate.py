"""The rate of a running total over the last seconds. Pure: the time is passed in."""

from __future__ import annotations

from collections import deque


class WindowedRate:
    """Answers come in batches, so a rate of one second is 0 or far too high; this one looks further back."""

    def __init__(self, window_s: float) -> None:
        """Look back `window_s` seconds, or as far as the totals go."""
        self._window_s = window_s
        self._totals: deque[tuple[float, int]] = deque()

    def add(self, now_s: float, total: int) -> float:
        """Take the total of this moment; returns its growth a second since the beginning of the window.

        The window begins anew with a total that has fallen: ranks went back to a checkpoint.
        """
        if self._totals and total < self._totals[-1][1]:
            self._totals.clear()
        self._totals.append((now_s, total))
        while len(self._totals) > 2 and self._totals[1][0] <= now_s - self._window_s:
            self._totals.popleft()
        then_s, before = self._totals[0]
        return (total - before) / (now_s - then_s) if now_s > then_s else 0.0
