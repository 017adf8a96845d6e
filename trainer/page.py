"""The dashboard that a driver starts beside itself, and again whenever something kills it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from services.dashboard.process import DashboardProcess
from services.errors import SlipstreamError
from services.restarts import RestartBudget
from trainer.console import RunConsole
from trainer.supervision import MOST_RESTARTS, RESTART_WINDOW_S

LOOK_S = 0.5


@contextmanager
def own_dashboard(output_dir: Path, console: RunConsole) -> Iterator[None]:
    """Serve the run's page while the context lasts, and say where as soon as it answers.

    Training needs no dashboard: the run neither waits for it nor ends with it.
    """
    page = _Page(output_dir, console)
    try:
        yield
    finally:
        page.close()


class _Page:
    def __init__(self, output_dir: Path, console: RunConsole) -> None:
        self._output_dir = output_dir
        self._console = console
        self._ending = threading.Event()
        self._process = DashboardProcess(output_dir)
        self._thread = threading.Thread(target=self._keep, name="dashboard", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the dashboard."""
        self._ending.set()
        self._process.stop()
        self._thread.join()
        self._process.close()

    def _keep(self) -> None:
        """Say where it is, and start it again when it was killed: at the same place, as its file tells."""
        budget = RestartBudget(MOST_RESTARTS, RESTART_WINDOW_S)
        if not self._announce("dashboard: {url}"):
            return
        while not self._ending.wait(LOOK_S):
            if self._process.is_alive:
                continue
            if budget.spend(time.monotonic()) is None:
                self._console.say("the dashboard was killed too often and is not started again")
                return
            self._process.close()
            self._process = DashboardProcess(self._output_dir)
            if self._ending.is_set():  # `close` may have stopped the one before
                self._process.stop()
            elif not self._announce("the dashboard was killed and is back: {url}"):
                return

    def _announce(self, text: str) -> bool:
        try:
            self._console.say(text.format(url=self._process.url()))
        except SlipstreamError as error:
            if not self._ending.is_set():
                self._console.say(f"no dashboard: {error}")
            return False
        return True
