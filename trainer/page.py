"""The dashboard that a driver starts beside itself."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from services.dashboard.process import DashboardProcess
from services.errors import SlipstreamError
from trainer.console import RunConsole


@contextmanager
def own_dashboard(output_dir: Path, console: RunConsole) -> Iterator[None]:
    """Serve the run's page while the context lasts, and say where as soon as it answers.

    Training needs no dashboard: the run neither waits for it nor ends with it.
    """

    def announce() -> None:
        try:
            console.say(f"dashboard: {process.url()}")
        except SlipstreamError as error:
            if not ending.is_set():
                console.say(f"no dashboard: {error}")

    ending = threading.Event()
    with DashboardProcess(output_dir) as process:
        announcing = threading.Thread(target=announce, name="dashboard-url", daemon=True)
        announcing.start()
        try:
            yield
        finally:
            ending.set()
            process.stop()
            announcing.join()
