"""Ends calls that give nothing for too long. gRPC knows deadlines of whole calls only, and a blocking read has none."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

TICK_S = 0.1
"""How often waits are looked at: a deadline is met this exactly."""


class Wait:
    """One call's wait for its next message.

    Attributes:
        is_over: Whether the call was cancelled because a wait took too long.
    """

    def __init__(self, cancel: Callable[[], object]) -> None:
        """Watch nothing yet; `cancel` ends the call."""
        self.is_over = False
        self._cancel = cancel
        self._deadline_s: float | None = None

    def begin(self, patience_s: float) -> None:
        """The call is asked for its next message, and has this long to give it."""
        self._deadline_s = time.monotonic() + patience_s

    def end(self) -> None:
        """The message is here. What the reader does with it takes no patience."""
        self._deadline_s = None

    def look(self, now_s: float) -> None:
        """Cancel the call if it has kept its reader waiting for too long."""
        deadline_s = self._deadline_s
        if deadline_s is not None and now_s > deadline_s:
            self.is_over = True
            self._cancel()


class Patience:
    """Looks at the waits of many calls, in one thread that runs while there are any."""

    def __init__(self) -> None:
        """Watch no call yet."""
        self._lock = threading.Lock()
        self._waits: set[Wait] = set()
        self._is_watching = False

    @contextmanager
    def watch(self, cancel: Callable[[], object]) -> Iterator[Wait]:
        """Watch a call for as long as the context lasts.

        Args:
            cancel: Ends the call, from another thread.
        """
        wait = Wait(cancel)
        with self._lock:
            self._waits.add(wait)
            if not self._is_watching:
                self._is_watching = True
                threading.Thread(target=self._run, name="patience", daemon=True).start()
        try:
            yield wait
        finally:
            with self._lock:
                self._waits.discard(wait)

    def _run(self) -> None:
        while True:
            time.sleep(TICK_S)
            now_s = time.monotonic()
            with self._lock:
                if not self._waits:
                    self._is_watching = False
                    return
                waits = list(self._waits)
            for wait in waits:
                wait.look(now_s)
