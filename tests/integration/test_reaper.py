"""What a driver started of its Ray ends with the driver, even where it does not end by itself."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from waiting import WAIT_S, wait_until

from trainer import reaper as reaper_module
from trainer.reaper import MARK, Reaper, end_marked

SLEEPER = [sys.executable, "-c", "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"]

DRIVER = """
import subprocess, sys, time
from trainer.reaper import Reaper
reaper = Reaper(grace_s=0.5)
with reaper.marking():
    child = subprocess.Popen(sys.argv[1:], start_new_session=True)
print(child.pid, flush=True)
time.sleep(600)
"""


@pytest.fixture
def bystander() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(SLEEPER)
    yield process
    process.kill()
    process.wait()


def test_what_a_killed_driver_leaves_is_ended(tmp_path: Path, bystander: subprocess.Popen[bytes]) -> None:
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, *SLEEPER], stdout=subprocess.PIPE, text=True)
    assert driver.stdout is not None
    left = psutil.Process(int(driver.stdout.readline()))
    driver.kill()
    driver.wait()
    driver.stdout.close()
    wait_until(lambda: not left.is_running(), "the reaper did not end what the driver left")
    assert bystander.poll() is None


def test_reaper_that_stood_still_for_all_its_time_kills_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    left = subprocess.Popen(SLEEPER, env={**os.environ, MARK: "stood-still"})
    hours_s = itertools.count(0.0, 3600.0)
    clock = SimpleNamespace(monotonic=lambda: next(hours_s), sleep=time.sleep)
    monkeypatch.setattr(reaper_module, "time", clock)
    end_marked("stood-still")
    assert left.wait(timeout=WAIT_S) < 0


def test_process_started_outside_the_mark_lives_on(bystander: subprocess.Popen[bytes]) -> None:
    with Reaper(grace_s=0.5) as reaper:
        with reaper.marking():
            marked = subprocess.Popen(SLEEPER)
        unmarked = subprocess.Popen(SLEEPER)
    assert marked.wait(timeout=WAIT_S) < 0
    assert unmarked.poll() is None
    unmarked.kill()
    unmarked.wait()


def test_process_that_ends_in_the_time_of_grace_is_left_alone() -> None:
    with Reaper(grace_s=2 * WAIT_S) as reaper, reaper.marking():
        ending = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    assert ending.stdin is not None
    ending.stdin.close()
    assert ending.wait(timeout=WAIT_S) == 0
