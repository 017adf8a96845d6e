"""Ends what a driver leaves of its local Ray, however the driver ended.

Ray's daemons die with their driver, and workers and agents when they miss their daemon. But an agent that misses it
first tells Ray's control service so, and waits up to a minute for one that is dead as well.

Run as `python -m trainer.reaper`, with the driver holding the other end of standard input. At end of file the processes
of that Ray, which all carry a mark in their environment, have `GRACE_S` to end by themselves; the rest is killed.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Self

import psutil

MARK = "SLIPSTREAM_LOCAL_RAY"
"""Environment variable that all processes of a local Ray carry; its value says of which."""

GRACE_S = 5.0
KILLING_S = 10.0
"""How long it keeps killing, from the first time on: a process that is just being started may be seen later."""

POLL_S = 0.2


class Reaper:
    """The driver's side. Closing it, or dying, ends every process that was started while `marking`.

    Args:
        grace_s: How long they have to end by themselves.
    """

    def __init__(self, grace_s: float = GRACE_S) -> None:
        self._mark = secrets.token_hex(8)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "trainer.reaper", self._mark, "--grace-s", str(grace_s)],
            stdin=subprocess.PIPE,
            start_new_session=True,  # no signal to the terminal's or the driver's group reaches it
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @contextlib.contextmanager
    def marking(self) -> Iterator[None]:
        """Whatever is started in this context, and all that it starts in turn, ends with the driver."""
        os.environ[MARK] = self._mark
        try:
            yield
        finally:
            del os.environ[MARK]

    def close(self) -> None:
        """Have it end what is left, and itself then; that takes its grace at most, and nobody waits for it."""
        assert self._process.stdin is not None
        self._process.stdin.close()


def main() -> None:
    """Wait for the driver's end, then for that of its Ray."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("mark", help=f"value of {MARK} in the environment of the processes to end")
    parser.add_argument("--grace-s", type=float, default=GRACE_S, help="how long they have to end by themselves")
    arguments = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):  # `ray job stop` sends one to every process below the driver
        signal.signal(number, signal.SIG_IGN)
    sys.stdin.read()
    end_marked(arguments.mark, arguments.grace_s)


def end_marked(mark: str, grace_s: float = GRACE_S) -> None:
    """Give the processes that carry a mark some time to end by themselves, and kill the rest."""
    grace_ends_s = time.monotonic() + grace_s
    killing_ends_s: float | None = None
    while (left := marked(mark)) and (killing_ends_s is None or time.monotonic() < killing_ends_s):
        if time.monotonic() >= grace_ends_s:
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            # On a busy machine looking for them may have taken long.
            killing_ends_s = killing_ends_s or time.monotonic() + KILLING_S
        time.sleep(POLL_S)


def marked(mark: str) -> list[psutil.Process]:
    """The living processes that carry this mark."""
    return [process for process in psutil.process_iter() if _mark_of(process) == mark]


def _mark_of(process: psutil.Process) -> str | None:
    try:
        if process.status() == psutil.STATUS_ZOMBIE:
            return None
        return process.environ().get(MARK)
    except (psutil.NoSuchProcess, psutil.AccessDenied):  # it has just ended, or is another user's
        return None


if __name__ == "__main__":
    main()
