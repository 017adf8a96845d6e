"""The memory that replay shard and trainer ranks of one host share: a file without a name, held by the run's driver.

The file is made in /dev/shm with `O_TMPFILE`, of mode 0600, and all of its bytes are allocated at once. It never has a
name there, so nobody has to remove it: the kernel frees its memory when the last process that has it open is gone, and
that is so after a SIGKILL of everything. There can be no file of a dead run, and none of another run is ever touched.
The shard and the ranks open it as /proc/<driver>/fd/<number>, which takes the same host, the same user and the same
container; device and inode say whether it is the same file. The driver holds it for as long as the run lives, so
neither a shard that is killed nor a Redis that comes back empty costs a second file's worth of memory.
"""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path
from types import TracebackType
from typing import Self

from services.contracts import Record
from services.errors import ReplayError
from services.replay import range_locks
from services.replay.extents import Extent

SHARED_MEMORY = Path("/dev/shm")

CONTROL_GROUP = Path("/sys/fs/cgroup")

GROUP_FILES = (
    ("memory.max", "memory.current", "memory.stat", ("active_file", "inactive_file")),
    (
        "memory/memory.limit_in_bytes",
        "memory/memory.usage_in_bytes",
        "memory/memory.stat",
        ("total_active_file", "total_inactive_file"),
    ),
)
"""Limit, usage, and counts of a control group, and which counts are of cached files; for versions 2 and 1."""

WAYS_OUT = (
    "make it larger (docker run --shm-size, in Kubernetes an emptyDir of medium Memory), lower replay.capacity, or use "
    "replay.tier=redis"
)


class ArenaPlace(Record):
    """Where an arena is, for processes on the same host."""

    path: str
    device: int
    inode: int
    capacity_bytes: int

    @property
    def text(self) -> str:
        """As it stands in a URL."""
        return f"{self.path}:{self.device}:{self.inode}:{self.capacity_bytes}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """From `text`.

        Raises:
            ReplayError: It is none.
        """
        match = re.fullmatch(r"(/proc/\d+/fd/\d+):(\d+):(\d+):(\d+)", text)
        if match is None:
            raise ReplayError(f"{text!r} is no place of a shared-memory arena: leave arena= out of replay.redis")
        path, *numbers = match.groups()
        device, inode, capacity_bytes = map(int, numbers)
        return cls(path=path, device=device, inode=inode, capacity_bytes=capacity_bytes)


class Arena:
    """A held arena; `close` gives it up, and so does the end of this process."""

    def __init__(self, capacity_bytes: int, folder: Path = SHARED_MEMORY) -> None:
        """Allocate it.

        Args:
            capacity_bytes: Its size.
            folder: On a file system that lives in memory.

        Raises:
            ReplayError: There is not enough memory for it, or this system has no such files.
        """
        if why := why_no_arena(capacity_bytes, folder):
            raise ReplayError(why)
        self._descriptor = os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(self._descriptor, 0, capacity_bytes)
            range_locks.unlocked(self._descriptor, Extent(0, capacity_bytes))
        except OSError as error:
            os.close(self._descriptor)
            if error.errno == errno.ENOSPC:  # somebody else was quicker
                raise ReplayError(_too_small(capacity_bytes, folder)) from error
            raise ReplayError(
                f"replay.tier=shm needs files in {folder} whose ranges can be locked, and this system answers: "
                f"{error}. Use replay.tier=redis."
            ) from error
        status = os.fstat(self._descriptor)
        self.place = ArenaPlace(
            path=f"/proc/{os.getpid()}/fd/{self._descriptor}",
            device=status.st_dev,
            inode=status.st_ino,
            capacity_bytes=capacity_bytes,
        )

    def close(self) -> None:
        """Give it up; those who have it open keep it. Again: nothing happens."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_arena(place: ArenaPlace, flags: int) -> int:
    """Open an arena that another process holds.

    Args:
        place: Where it is.
        flags: `os.O_RDONLY` or `os.O_RDWR`.

    Returns:
        A descriptor of an open file of its own.

    Raises:
        ReplayError: It cannot be reached from here, or its run has ended.
    """
    try:
        descriptor = os.open(place.path, flags | os.O_CLOEXEC)
    except OSError as error:
        raise ReplayError(_out_of_reach(place, str(error))) from error
    status = os.fstat(descriptor)
    if (status.st_dev, status.st_ino, status.st_size) != (place.device, place.inode, place.capacity_bytes):
        os.close(descriptor)
        raise ReplayError(_out_of_reach(place, "another file is there"))
    return descriptor


def why_no_arena(capacity_bytes: int, folder: Path = SHARED_MEMORY) -> str:
    """Why an arena of this size cannot be made; empty if it seems that it can."""
    if not range_locks.is_supported() or not hasattr(os, "O_TMPFILE"):
        return "replay.tier=shm needs Linux. Use replay.tier=redis."
    try:
        free_bytes = _free_bytes(folder)
    except OSError as error:
        return f"replay.tier=shm needs {folder}, and there is none: {error}. Use replay.tier=redis."
    if free_bytes is not None and free_bytes < capacity_bytes:
        return _too_small(capacity_bytes, folder)
    available_bytes = _available_memory_bytes()
    if available_bytes < capacity_bytes:
        return (
            f"replay.tier=shm needs replay.capacity = {capacity_bytes} bytes of memory, and {available_bytes} are "
            "available on this host. Lower replay.capacity."
        )
    return ""


def _too_small(capacity_bytes: int, folder: Path) -> str:
    return (
        f"replay.tier=shm needs replay.capacity = {capacity_bytes} bytes in {folder}, of which {_free_bytes(folder)} "
        f"are free: {WAYS_OUT}."
    )


def _out_of_reach(place: ArenaPlace, why: str) -> str:
    return (
        f"the shared-memory arena of this run cannot be opened at {place.path}: {why}. With replay.tier=shm the "
        "driver, the replay shard and all trainer ranks must be on one host, in one container and of one user, and the "
        "driver must be alive. Use replay.tier=redis, or auto, or place the ranks by trainer.labels."
    )


def _free_bytes(folder: Path) -> int | None:
    """What can still be allocated on a file system; None where it sets no limit."""
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize if status.f_blocks else None


def _available_memory_bytes() -> int:
    """What can be allocated before somebody is killed for it: the least of what the host and this container have."""
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    on_host = int(fields["MemAvailable"].split()[0]) * 1024
    return min(found for found in (on_host, _available_in_group()) if found is not None)


def _available_in_group(group: Path = CONTROL_GROUP) -> int | None:
    """What this container may take yet; its cached files make way. None: it has no limit of its own."""
    for limit, usage, statistics, files in GROUP_FILES:
        if not (group / limit).exists():
            continue
        limit_text = (group / limit).read_text().strip()
        if limit_text == "max":
            return None
        counts = dict(line.split() for line in (group / statistics).read_text().splitlines())
        return int(limit_text) - int((group / usage).read_text()) + sum(int(counts[name]) for name in files)
    return None
