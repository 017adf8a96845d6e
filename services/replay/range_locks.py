"""Locks on ranges of a file's bytes that the kernel keeps: proof of who still reads, and of who is dead.

A lock belongs to an open file (`F_OFD_SETLK`, Linux), not to a process: it ends when it is taken back or when the last
descriptor of that open file is closed, and closing is the first thing that happens to a process that dies, however it
dies. So a range without a lock has no living reader: the same proof that a pidfd gives, without a moment between
asking and dying, without a process id that is given to somebody else, and also across containers that share the file. A
reader that is stopped keeps its lock for as long as it is stopped.
"""

from __future__ import annotations

import fcntl
import os
import struct

from services.replay.extents import Extent, Extents

_FLOCK = "@hhqqi4x"
"""struct flock of 64-bit Linux: type, whence, start, length, process id."""


def is_supported() -> bool:
    """Whether this system has such locks at all."""
    return hasattr(fcntl, "F_OFD_SETLK")


def lock_shared(descriptor: int, extent: Extent) -> None:
    """Lock bytes for reading, until the descriptor's open file is closed.

    Raises:
        OSError: A writer has locked some of them.
    """
    _set(descriptor, fcntl.F_RDLCK, extent)


def try_lock_exclusive(descriptor: int, extent: Extent) -> bool:
    """Lock bytes for writing, until the descriptor's open file is closed; False if somebody else has locked some."""
    try:
        _set(descriptor, fcntl.F_WRLCK, extent)
    except BlockingIOError:
        return False
    return True


def unlocked(descriptor: int, extent: Extent) -> Extents:
    """Those of the bytes that nobody else has locked, ascending.

    Args:
        descriptor: Of the file, open for writing.
        extent: The bytes in question.
    """
    found: list[Extent] = []
    rest = [extent]
    while rest:
        part = rest.pop()
        if not part.num_bytes:
            continue
        lock = _first_lock(descriptor, part)
        if lock is None:
            found.append(part)
        else:
            rest += [
                Extent(part.start, max(part.start, lock.start)),
                Extent(min(part.end, lock.end), part.end),
            ]
    return tuple(sorted(found))


def _set(descriptor: int, kind: int, extent: Extent) -> None:
    fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _request(kind, extent))


def _first_lock(descriptor: int, extent: Extent) -> Extent | None:
    """One lock of somebody else's that keeps these bytes from being written."""
    answer = fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, _request(fcntl.F_WRLCK, extent))
    kind, _, start, length, _ = struct.unpack(_FLOCK, answer)
    if kind == fcntl.F_UNLCK:
        return None
    return Extent(start, start + length if length else extent.end)  # length 0 means up to any end


def _request(kind: int, extent: Extent) -> bytes:
    return struct.pack(_FLOCK, kind, os.SEEK_SET, extent.start, extent.num_bytes, 0)
