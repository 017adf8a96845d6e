"""How often something that died is started again before that is called a failure. State only: time is passed in."""

from __future__ import annotations


class RestartBudget:
    """So many restarts within a window of time; more of them mean that it cannot work.

    Args:
        most: Restarts allowed within the window.
        window_s: A restart counts for so long.
    """

    def __init__(self, most: int, window_s: float) -> None:
        self.most = most
        self.window_s = window_s
        self._spent: list[float] = []

    def spend(self, now_s: float) -> int | None:
        """Count one restart.

        Returns:
            How many were made within the window, this one included; None if there have been too many.
        """
        self._spent = [*(moment for moment in self._spent if now_s - moment < self.window_s), now_s]
        return len(self._spent) if len(self._spent) <= self.most else None
