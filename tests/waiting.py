"""How tests wait for what other threads and processes do: a condition, polled until a deadline."""

from __future__ import annotations

import time
from collections.abc import Callable

WAIT_S = 120.0
"""Long enough for a busy machine with two cores, where a process may take half a minute to start and any may stand
still for ten seconds; nobody waits that long where things work."""


def wait_until(condition: Callable[[], object], what: str | Callable[[], str], timeout_s: float = WAIT_S) -> None:
    """Poll until `condition()` is true; fail with `what` when the time is over."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() >= deadline_s:
            text = what if isinstance(what, str) else what()
            raise AssertionError(f"not within {timeout_s:g} s: {text}")
        time.sleep(0.01)
