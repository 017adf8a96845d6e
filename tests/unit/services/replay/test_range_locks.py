"""Locks on ranges of the arena: they end with their open file, and with the process that has it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.replay import range_locks
from services.replay.extents import Extent

READER = """
import os, sys
from services.replay import range_locks
from services.replay.extents import Extent
descriptor = os.open(sys.argv[1], os.O_RDONLY)
range_locks.lock_shared(descriptor, Extent(10, 20))
print("locked", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "file").write_bytes(bytes(100))
    return tmp_path / "file"


@pytest.fixture
def writer(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDWR)
    yield descriptor
    os.close(descriptor)


def test_unlocked_parts_are_those_that_nobody_reads(path: Path, writer: int) -> None:
    first, second = os.open(path, os.O_RDONLY), os.open(path, os.O_RDONLY)
    range_locks.lock_shared(first, Extent(10, 20))
    range_locks.lock_shared(second, Extent(15, 30))
    range_locks.lock_shared(second, Extent(50, 51))
    assert range_locks.unlocked(writer, Extent(0, 100)) == ((0, 10), (30, 50), (51, 100))
    assert range_locks.unlocked(writer, Extent(12, 28)) == ()
    os.close(second)
    assert range_locks.unlocked(writer, Extent(0, 100)) == ((0, 10), (20, 100))
    os.close(first)
    assert range_locks.unlocked(writer, Extent(0, 100)) == ((0, 100),)


def test_range_has_one_writer_at_a_time(path: Path, writer: int) -> None:
    other = os.open(path, os.O_RDWR)
    assert range_locks.try_lock_exclusive(writer, Extent(100, 101))
    assert not range_locks.try_lock_exclusive(other, Extent(100, 101))
    with pytest.raises(BlockingIOError):
        range_locks.lock_shared(other, Extent(100, 101))
    os.close(other)
    assert range_locks.try_lock_exclusive(writer, Extent(100, 101))


def test_lock_outlives_a_stopped_process_and_ends_with_a_killed_one(path: Path, writer: int) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", READER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as reader:
        assert reader.stdout is not None
        assert reader.stdout.readline() == "locked\n"
        reader.send_signal(signal.SIGSTOP)
        assert range_locks.unlocked(writer, Extent(0, 100)) == ((0, 10), (20, 100))
        reader.kill()
        reader.wait()
        assert range_locks.unlocked(writer, Extent(0, 100)) == ((0, 100),)
