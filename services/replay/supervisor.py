"""Keeps the embedded Redis alive, and ends it when the driver is gone.

Run as `python -m services.replay.supervisor`, with the driver holding the other end of standard input: end of file
ends Redis, however the driver died, and nothing else does but SIGKILL: a driver that is asked to stop needs Redis until
its last checkpoint is written. It is no child of Ray and has its own session, so neither a Ctrl-C at the terminal nor
the end of a worker reaches it. One line on standard output says `ready`, or why not.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import secrets
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

NONCE_KEY = "slipstream:nonce"
"""Set anew at each start of Redis: a client that reads another value than before talks to an empty Redis."""

START_TIMEOUT_S = 15.0
POLL_S = 0.1
START_POLL_S = 0.01

MOST_RESTARTS = 5
RESTART_WINDOW_S = 60.0
"""More restarts than this within the window mean that it cannot work: the supervisor gives up and says so."""

PR_SET_PDEATHSIG = 1

MALLOC_SETTINGS = {
    "MALLOC_MMAP_THRESHOLD_": str(1024**3),
    "MALLOC_TRIM_THRESHOLD_": str(2 * 1024**3 - 1),
    "MALLOC_TOP_PAD_": str(64 * 1024**2),
}
"""glibc maps and unmaps each megabyte-sized value otherwise, and every page of it faults again."""


class StartError(Exception):
    """Redis did not come up; the message says why."""


def main() -> int:
    """Supervise until standard input ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--server", required=True, help="redis-server or valkey-server binary")
    parser.add_argument("--socket", required=True, type=Path, help="unix socket to listen on; its folder is removed")
    parser.add_argument("--maxmemory", required=True, type=int, help="bytes")
    parser.add_argument("--log", required=True, type=Path, help="where Redis and the supervisor log")
    arguments = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # `ray job stop` sends it to every process below the driver at once
    supervisor = _Supervisor(arguments.server, arguments.socket, arguments.maxmemory, arguments.log)
    try:
        return supervisor.run()
    finally:
        supervisor.stop()


class _Supervisor:
    def __init__(self, server: str, socket: Path, maxmemory_bytes: int, log: Path) -> None:
        self._command = [
            *(server, "--port", "0", "--unixsocket", str(socket), "--unixsocketperm", "600"),
            *("--maxmemory", str(maxmemory_bytes), "--maxmemory-policy", "noeviction"),
            *("--save", "", "--appendonly", "no", "--dir", str(socket.parent), "--logfile", str(log)),
            *("--daemonize", "no", "--loglevel", "notice"),
        ]
        self._socket = socket
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None

    def run(self) -> int:
        try:
            self._start()
        except StartError as error:
            _tell(f"failed: {error}")
            return 1
        _tell("ready")
        restarts: list[float] = []
        while True:
            readable, _, _ = select.select([sys.stdin], [], [], POLL_S)
            if readable and not os.read(sys.stdin.fileno(), 4096):
                return 0
            if self._process is None or self._process.poll() is None:
                continue
            now = time.monotonic()
            restarts = [*(moment for moment in restarts if now - moment < RESTART_WINDOW_S), now]
            self._note(f"redis ended with status {self._process.returncode}; restart {len(restarts)}")
            if len(restarts) > MOST_RESTARTS:
                self._note(f"{MOST_RESTARTS} restarts within {RESTART_WINDOW_S:g} s: giving up")
                return 1
            try:
                self._start()
            except StartError as error:
                self._note(f"restart failed: {error}")
                return 1

    def _start(self) -> None:
        self._socket.unlink(missing_ok=True)
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, **MALLOC_SETTINGS},
            preexec_fn=_live_as_long_as_parent,  # this process has one thread, so the hook is safe
        )
        # redis-py's own retries would hide for seconds that the server has ended.
        client = redis.Redis(
            unix_socket_path=str(self._socket), socket_timeout=START_TIMEOUT_S, retry=Retry(NoBackoff(), 0)
        )
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            try:
                client.set(NONCE_KEY, secrets.token_hex(16))
                break
            except (redis.exceptions.ConnectionError, redis.exceptions.TimeoutError) as error:
                if self._process.poll() is not None:
                    raise StartError(f"it ended with status {self._process.returncode}; see {self._log}") from error
                if time.monotonic() > deadline:
                    raise StartError(f"it does not answer after {START_TIMEOUT_S:g} s; see {self._log}") from error
                time.sleep(START_POLL_S)
        client.close()

    def stop(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.kill()  # it saves nothing, so there is nothing to end in order
            self._process.wait()
        shutil.rmtree(self._socket.parent, ignore_errors=True)

    def _note(self, message: str) -> None:
        with self._log.open("a", encoding="utf-8") as log:
            log.write(f"supervisor: {message}\n")


def _tell(line: str) -> None:
    # The driver may be gone already; then the end of file on standard input follows at once.
    with contextlib.suppress(BrokenPipeError):
        os.write(sys.stdout.fileno(), f"{line}\n".encode())


def _live_as_long_as_parent() -> None:
    """Tie Redis to the supervisor: deaf to SIGTERM as that is, and killed by Linux when it dies, even by SIGKILL.

    Redis has a handler of its own for SIGTERM, but leaves the mask of blocked signals as it finds it.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
