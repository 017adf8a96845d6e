"""The driver's own dashboard: a child process that ends with the driver, whichever way that ends."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from services.errors import SlipstreamError

START_TIMEOUT_S = 120.0
"""Importing the web server takes a second on an idle machine; a run's start is not idle, and it does not wait."""

CLOSE_TIMEOUT_S = 20.0
"""More than the server gives its pages."""

LOG = "dashboard.log"


class DashboardProcess:
    """A dashboard under way; the run goes on without it if it fails.

    Args:
        output_dir: The run's directory; holds the log `dashboard.log` and, while the dashboard runs, `dashboard.json`.
        host: Where it listens.
        port: 0 takes a free one.
    """

    def __init__(self, output_dir: Path, *, host: str = "127.0.0.1", port: int = 0) -> None:
        self._log = output_dir / LOG
        command = [sys.executable, "-m", "services.dashboard.server", "--output-dir", str(output_dir)]
        command += ["--host", host, "--port", str(port)]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,  # a Ctrl-C at the terminal is for the driver, which then closes in order
            )

    def url(self) -> str:
        """Wait until it serves; the page's address, with the token.

        Raises:
            SlipstreamError: It does not start; names the log.
        """
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        deadline_s = time.monotonic() + START_TIMEOUT_S
        line = b""
        while not line.endswith(b"\n"):
            readable, _, _ = select.select([descriptor], [], [], max(0.0, deadline_s - time.monotonic()))
            data = os.read(descriptor, 4096) if readable else b""
            if not data:
                raise SlipstreamError(f"the dashboard did not start; the run goes on without it. See {self._log}")
            line += data
        answer: dict[str, str] = json.loads(line)
        if "error" in answer:
            raise SlipstreamError(answer["error"])
        return answer["url"]

    @property
    def is_alive(self) -> bool:
        """Whether it still runs."""
        return self._process.poll() is None

    def stop(self) -> None:
        """End it; its pages hear of everything recorded so far, and who waits for `url` that it will not come."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(CLOSE_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def close(self) -> None:
        """End it and close its pipes; nobody may be waiting for `url` any more. Again: nothing happens."""
        self.stop()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
