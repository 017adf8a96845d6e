"""Waiting until a run that was asked to stop has ended."""

from __future__ import annotations

import os
import select
import socket
import sys
import time
from typing import Self

from services.control.client import RunControl, running_runs
from services.control.records import RunStatus
from services.errors import DeadlineError

POLL_S = 0.5


class RunEnd:
    """The end of a run; make it with `of` before the run is asked to stop.

    On the driver's own machine it is the end of its process: then its output directory is free too, and a local Ray,
    which ends with its run, is not asked any more. Elsewhere it is the end of the run's desk.

    Args:
        run_id: The run.
        process: File descriptor (pidfd) of its driver, None if that is out of reach; `wait` closes it.
    """

    def __init__(self, run_id: str, process: int | None) -> None:
        self._run_id = run_id
        self._process = process

    @classmethod
    def of(cls, control: RunControl) -> Self:
        """The end of a living run.

        Raises:
            RunEndedError: It has ended.
            DeadlineError: Its desk does not answer.
        """
        return cls(control.run_id, open_driver(control.status()))

    def wait(self, timeout_s: float) -> None:
        """Wait for it.

        Raises:
            DeadlineError: It does not come in time.
        """
        has_ended = self._wait_desk(timeout_s) if self._process is None else _wait_process(self._process, timeout_s)
        if not has_ended:
            raise DeadlineError(f"run {self._run_id} has not ended within {timeout_s:g} s; see its driver's output")

    def _wait_desk(self, timeout_s: float) -> bool:
        deadline_s = time.monotonic() + timeout_s
        while self._run_id in running_runs():
            if time.monotonic() >= deadline_s:
                return False
            time.sleep(POLL_S)
        return True


def open_driver(status: RunStatus) -> int | None:
    """A file descriptor that becomes readable when the run's driver ends; None if it is out of reach."""
    if sys.platform != "linux" or status.host != socket.gethostname():
        return None
    try:
        return os.pidfd_open(status.pid)
    except OSError:  # another container under the same host name, or an old kernel
        return None


def _wait_process(process: int, timeout_s: float) -> bool:
    import ray

    ray.shutdown()  # a process that is attached to a cluster when it ends is ended by Ray after a minute
    try:
        return bool(select.select([process], [], [], timeout_s)[0])
    finally:
        os.close(process)
