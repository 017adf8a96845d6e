"""The arena's file: no name, the size that it says, clear refusals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from services.errors import ReplayError
from services.replay import arena as arena_module
from services.replay.arena import SHARED_MEMORY, Arena, open_arena, why_no_arena

CAPACITY_BYTES = 1_000_003

HOLDER = """
import sys
from services.replay.arena import Arena
with Arena(64 * 1024**2) as arena:
    print(arena.place.model_dump_json(), flush=True)
    sys.stdin.read()
"""


def test_arena_is_of_the_size_asked_for_private_and_nameless() -> None:
    with Arena(CAPACITY_BYTES) as arena:
        descriptor = open_arena(arena.place, os.O_RDWR)
        status = os.fstat(descriptor)
        assert (status.st_size, status.st_mode & 0o777, status.st_nlink) == (CAPACITY_BYTES, 0o600, 0)
        assert status.st_blocks * 512 >= CAPACITY_BYTES, "all of it is allocated"
        assert os.readlink(arena.place.path).endswith(" (deleted)"), "it has no name, nor ever had one"
        os.pwrite(descriptor, b"there", CAPACITY_BYTES - 5)
    assert os.pread(descriptor, 10, CAPACITY_BYTES - 5) == b"there", "who has it open keeps it"
    os.close(descriptor)


def test_shared_memory_that_is_too_small_is_refused_with_both_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena_module, "_free_bytes", lambda folder: 64 * 1024**2)
    with pytest.raises(ReplayError) as error:
        Arena(4 * 1024**3)
    for part in (str(4 * 1024**3), str(64 * 1024**2), "/dev/shm", "--shm-size", "replay.capacity", "replay.tier=redis"):
        assert part in str(error.value)


def test_shared_memory_that_fills_up_meanwhile_is_refused_likewise(monkeypatch: pytest.MonkeyPatch) -> None:
    status = os.statvfs(SHARED_MEMORY)
    too_much = (status.f_blocks + 1) * status.f_frsize  # the kernel sees at once that this cannot be
    monkeypatch.setattr(arena_module, "why_no_arena", lambda capacity_bytes, folder: "")
    with pytest.raises(ReplayError, match="--shm-size"):
        Arena(too_much)


def test_more_than_the_memory_of_this_host_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena_module, "_free_bytes", lambda folder: None)
    assert f"{2**60} bytes of memory" in why_no_arena(2**60)


@pytest.mark.parametrize("version", [1, 2])
def test_limit_of_a_container_counts_and_its_cached_files_do_not(tmp_path: Path, version: int) -> None:
    group = tmp_path / "memory" if version == 1 else tmp_path
    group.mkdir(exist_ok=True)
    limit, usage = (
        ("memory.limit_in_bytes", "memory.usage_in_bytes") if version == 1 else ("memory.max", "memory.current")
    )
    total = "total_" if version == 1 else ""
    (group / limit).write_text("1000\n")
    (group / usage).write_text("700\n")
    (group / "memory.stat").write_text(f"anon 500\n{total}active_file 50\n{total}inactive_file 150\n")
    assert arena_module._available_in_group(tmp_path) == 500


def test_container_without_a_limit_is_bounded_by_its_host(tmp_path: Path) -> None:
    assert arena_module._available_in_group(tmp_path) is None
    (tmp_path / "memory.max").write_text("max\n")
    assert arena_module._available_in_group(tmp_path) is None


def test_system_without_shared_memory_is_told_so(tmp_path: Path) -> None:
    assert str(tmp_path / "none") in why_no_arena(1, tmp_path / "none")


def test_arena_of_a_dead_run_leaves_nothing_and_is_said_to_be_gone() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        place = arena_module.ArenaPlace.model_validate_json(holder.stdout.readline())
        assert Path(place.path).stat().st_ino == place.inode
        assert os.readlink(place.path).startswith(f"{SHARED_MEMORY}/#"), "a file without a name"
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    with pytest.raises(ReplayError, match="the driver must be alive"):
        open_arena(place, os.O_RDONLY)


def test_number_that_was_given_to_another_file_is_not_taken_for_the_arena() -> None:
    with Arena(CAPACITY_BYTES) as arena:
        place = arena.place.model_copy(update={"inode": arena.place.inode + 1})
        with pytest.raises(ReplayError, match="another file is there"):
            open_arena(place, os.O_RDONLY)
