"""The dashboard that a driver starts: where it says it is, and that it ends with the driver however that ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest
from waiting import WAIT_S, wait_until

from services.dashboard import process as process_module
from services.dashboard.process import DashboardProcess
from services.errors import SlipstreamError


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A child is not killed because a busy machine lets it end slowly."""
    monkeypatch.setattr(process_module, "CLOSE_TIMEOUT_S", WAIT_S)


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url.partition('#')[0]}api/health", timeout=WAIT_S) as answer:
            return bool(answer.status == 200)
    except urllib.error.URLError:
        return False


def test_child_serves_publishes_for_this_user_alone_and_takes_it_back(tmp_path: Path) -> None:
    with DashboardProcess(tmp_path) as process:
        url = process.url()
        published = tmp_path / "dashboard.json"
        place = json.loads(published.read_text())
        assert place["url"] == url
        assert url.endswith(f"#token={place['token']}")
        assert published.stat().st_mode & 0o777 == 0o600
        assert psutil.pid_exists(place["pid"])
        assert answers(url)
        assert process.is_alive
    assert not process.is_alive
    assert not published.exists()
    assert not answers(url)
    process.close()


def test_child_ends_with_a_driver_that_is_killed(tmp_path: Path) -> None:
    script = (
        "import sys, time, pathlib\n"
        "from services.dashboard.process import DashboardProcess\n"
        "process = DashboardProcess(pathlib.Path(sys.argv[1]))\n"
        "print(process.url(), flush=True)\n"
        "time.sleep(600)\n"
    )
    driver = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert driver.stdout is not None
    url = driver.stdout.readline().strip()
    pid = json.loads((tmp_path / "dashboard.json").read_text())["pid"]
    assert answers(url)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    driver.stdout.close()
    wait_until(lambda: not psutil.pid_exists(pid), "the dashboard ends with its driver")
    assert not (tmp_path / "dashboard.json").exists()


def test_page_that_is_still_open_does_not_keep_the_child(tmp_path: Path) -> None:
    process = DashboardProcess(tmp_path)
    url = process.url().partition("#")[0]
    with urllib.request.urlopen(f"{url}api/events", timeout=WAIT_S) as stream:
        assert stream.readline().startswith(b"id: ")
        process.close()
        assert not process.is_alive
        assert stream.read().count(b"event: update") >= 1, "the stream ends in order"


def test_port_that_is_taken_is_named(tmp_path: Path) -> None:
    with DashboardProcess(tmp_path) as first:
        port = int(first.url().split(":")[2].partition("/")[0])
        with DashboardProcess(tmp_path, port=port) as second, pytest.raises(SlipstreamError, match=f"port {port}"):
            second.url()
        assert answers(f"http://127.0.0.1:{port}/")


def test_child_that_cannot_start_names_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with DashboardProcess(tmp_path) as process, pytest.raises(SlipstreamError, match=r"dashboard\.log"):
        process.url()
