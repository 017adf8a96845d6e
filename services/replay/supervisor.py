"""Keeps the embedded Redis alive, and ends it when the driver is gone.

Run as `python -m services.replay.supervisor`, with the driver holding the other end of standard input: end of file
ends Redis, however the driver died, and nothing else does but SIGKILL: a driver that is asked to stop needs Redis until
its last checkpoint is written. It is no child of Ray and has its own session, so neither a Ctrl-C at the terminal nor
the end of a worker reaches it. One line on standard output says `ready` and the TCP port (0 without TCP), or why not.

Where Redis shall listen on TCP, its password comes as the first line of standard input: a command line can be read by
everyone on the machine.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import random
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

from services.restarts import RestartBudget

NONCE_KEY = "slipstream:nonce"
"""Set anew at each start of Redis: a client that reads another value than before talks to an empty Redis."""

START_TIMEOUT_S = 60.0
POLL_S = 0.1
START_POLL_S = 0.01

MOST_RESTARTS = 5
RESTART_WINDOW_S = 60.0
"""More restarts than this within the window mean that it cannot work: the supervisor gives up and says so."""

PORTS = range(20000, 32000)
"""Redis cannot listen on "any free port", so some of these are tried: below those that the kernel gives to clients."""

MOST_PORTS_TRIED = 10

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
    parser.add_argument("--host", help="listen on this address, too; the password is then read from standard input")
    parser.add_argument("--port", type=int, default=0, help="TCP port; 0 takes a free one")
    arguments = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # `ray job stop` sends it to every process below the driver at once
    supervisor = _Supervisor(arguments, password=_read_line() if arguments.host else "")
    try:
        return supervisor.run()
    finally:
        supervisor.stop()


class _Supervisor:
    def __init__(self, arguments: argparse.Namespace, password: str) -> None:
        self._command = [
            *(arguments.server, "-"),  # the rest of its settings comes through standard input
            *("--unixsocket", str(arguments.socket), "--unixsocketperm", "600"),
            *("--maxmemory", str(arguments.maxmemory), "--maxmemory-policy", "noeviction"),
            *("--save", "", "--appendonly", "no", "--dir", str(arguments.socket.parent)),
            *("--logfile", str(arguments.log), "--daemonize", "no", "--loglevel", "notice"),
        ]
        self._socket: Path = arguments.socket
        self._log: Path = arguments.log
        self._host: str | None = arguments.host
        self._port: int = arguments.port
        self._password = password
        self._process: subprocess.Popen[bytes] | None = None

    def run(self) -> int:
        try:
            self._start_first()
        except StartError as error:
            _tell(f"failed: {error}")
            return 1
        _tell(f"ready {self._port}")
        budget = RestartBudget(MOST_RESTARTS, RESTART_WINDOW_S)
        while True:
            readable, _, _ = select.select([sys.stdin], [], [], POLL_S)
            if readable and not os.read(sys.stdin.fileno(), 4096):
                return 0
            if self._process is None or self._process.poll() is None:
                continue
            number = budget.spend(time.monotonic())
            if number is None:
                self._note(f"more than {MOST_RESTARTS} restarts within {RESTART_WINDOW_S:g} s: giving up")
                return 1
            self._note(f"redis ended with status {self._process.returncode}; restart {number}")
            try:
                self._start()
            except StartError as error:
                self._note(f"restart failed: {error}")
                return 1

    def _start_first(self) -> None:
        """Start Redis, on a port that nobody else has if it shall listen and none was chosen before."""
        if self._host is None:
            self._start()
            return
        if self._port:
            self._start_on_old_port()
            return
        ports = random.sample(PORTS, MOST_PORTS_TRIED)
        for number, self._port in enumerate(ports, start=1):
            try:
                self._start()
                return
            except StartError:
                if number == len(ports):
                    raise

    def _start_on_old_port(self) -> None:
        """Start Redis where an earlier one listened, whose supervisor was killed.

        It dies with its supervisor, but gives up its port only after its memory: gigabytes, or a busy machine, take a
        while.
        """
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            try:
                self._start()
                return
            except StartError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(POLL_S)

    def _start(self) -> None:
        self._socket.unlink(missing_ok=True)
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, **MALLOC_SETTINGS},
            preexec_fn=_live_as_long_as_parent,  # this process has one thread, so the hook is safe
        )
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError), self._process.stdin as settings:  # it may have ended; seen below
            settings.write(self._listening().encode())
        # redis-py's own retries would hide for seconds that the server has ended.
        client = redis.Redis(
            unix_socket_path=str(self._socket),
            password=self._password or None,
            socket_timeout=START_TIMEOUT_S,
            retry=Retry(NoBackoff(), 0),
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

    def _listening(self) -> str:
        """Redis' settings of where it listens, in the form of its configuration file."""
        if self._host is None:
            return "port 0\n"
        return f"bind {self._host}\nport {self._port}\nrequirepass {self._password}\n"

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


def _read_line() -> str:
    """One line of standard input and not a byte more."""
    line = b""
    while not line.endswith(b"\n"):
        byte = os.read(sys.stdin.fileno(), 1)
        if not byte:
            break
        line += byte
    return line.decode().strip()


def _live_as_long_as_parent() -> None:
    """Tie Redis to the supervisor: deaf to SIGTERM as that is, and killed by Linux when it dies, even by SIGKILL.

    Redis has a handler of its own for SIGTERM, but leaves the mask of blocked signals as it finds it.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
