"""Starting again what was killed: how often that is worth it, and what passes by itself meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from services.errors import NotBegunError, PartDiedError, ReplayUnavailableError, SlipstreamError, TableLostError
from services.restarts import RestartBudget

MOST_RESTARTS = 10
RESTART_WINDOW_S = 600.0
"""A part that dies more often than this within the window dies of something that starting it again does not cure."""

PASSING = (NotBegunError, PartDiedError, ReplayUnavailableError, TableLostError)
"""What a part meets while another one is being brought back."""

PASSING_DEADLINE_S = 180.0
RETRY_S = 0.2

Answer = TypeVar("Answer")


class Restarts:
    """Counts how often one part is started again; time is passed in.

    Args:
        what: Names the part.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._budget = RestartBudget(MOST_RESTARTS, RESTART_WINDOW_S)

    def count(self, now_s: float, cause: SlipstreamError) -> None:
        """Count a restart.

        Raises:
            PartDiedError: There were too many.
        """
        if self._budget.spend(now_s) is None:
            raise PartDiedError(
                f"{self._what} died more than {MOST_RESTARTS} times within {RESTART_WINDOW_S:g} s and is not started "
                f"again. Look at its log in logs/ and at Ray's; the last time: {cause}"
            ) from cause


def persist(ask: Callable[[], Answer], look: Callable[[], None]) -> Answer:
    """Ask until the answer is not that something is just being brought back.

    Args:
        ask: May raise one of `PASSING`, which after `PASSING_DEADLINE_S` is taken for good.
        look: Called between tries.
    """
    deadline_s = time.monotonic() + PASSING_DEADLINE_S
    while True:
        try:
            return ask()
        except PASSING:
            if time.monotonic() >= deadline_s:
                raise
        look()
        time.sleep(RETRY_S)
