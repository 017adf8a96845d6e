from __future__ import annotations

import json
from pathlib import Path

import pytest

from services.control import attach as attach_module
from services.control.attach import _token
from services.control.client import BEACON, UnknownRunError, choose_run, read_beacon
from services.errors import UsageError

RUNNING = ["demo-aaaaaa", "demo-bbbbbb", "qwen-cccccc"]


@pytest.mark.parametrize(
    ("wanted", "running", "chosen"),
    [
        ("demo-aaaaaa", RUNNING, "demo-aaaaaa"),
        ("qwen", RUNNING, "qwen-cccccc"),
        (None, ["demo-aaaaaa"], "demo-aaaaaa"),
        ("demo", ["demo", "demo-aaaaaa"], "demo"),
    ],
)
def test_run_is_chosen_by_id_by_name_or_as_the_only_one(wanted: str | None, running: list[str], chosen: str) -> None:
    assert choose_run(wanted, running) == chosen


@pytest.mark.parametrize(
    ("wanted", "running", "says"),
    [
        ("demo", RUNNING, "'demo' is the name of 2 runs: name one by its id; running are: demo-aaaaaa, demo-bbbbbb"),
        ("llama", RUNNING, "no run 'llama' here; running are: demo-aaaaaa, demo-bbbbbb, qwen-cccccc"),
        ("llama", [], "no run 'llama' here; no run is on this cluster"),
        (None, [], "no run is on this cluster"),
        (None, RUNNING, "3 runs are here"),
    ],
)
def test_run_that_is_not_one_is_refused_naming_those_that_run(
    wanted: str | None, running: list[str], says: str
) -> None:
    with pytest.raises(UnknownRunError, match=says) as refused:
        choose_run(wanted, running)
    assert refused.value.exit_code == 2


def test_beacon_is_read_where_a_run_lives(tmp_path: Path) -> None:
    assert read_beacon(tmp_path) is None
    assert read_beacon(tmp_path / "nowhere") is None
    content = {"run_id": "demo-aaaaaa", "ray_address": "10.0.0.1:6379", "pid": 3, "has_token": True}
    (tmp_path / BEACON).write_text(json.dumps(content))
    beacon = read_beacon(tmp_path)
    assert beacon is not None
    assert (beacon.run_id, beacon.ray_address, beacon.has_token) == ("demo-aaaaaa", "10.0.0.1:6379", True)
    (tmp_path / BEACON).write_text("{}")
    with pytest.raises(UsageError, match=BEACON):
        read_beacon(tmp_path)


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """No token anywhere, and a home of its own."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return monkeypatch


def test_token_is_sent_where_ray_sends_it(environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert _token("auto") == ""
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("from file\n")
    assert _token("auto") == "from file"
    assert _token("10.0.0.1:6379") == "", "to an address that was named only if told to"
    environment.setenv("RAY_AUTH_MODE", "token")
    assert _token("10.0.0.1:6379") == "from file"
    (tmp_path / "other").write_text("named")
    environment.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "other"))
    assert _token("10.0.0.1:6379") == "named"
    environment.setenv("RAY_AUTH_TOKEN", "from environment")
    assert _token("10.0.0.1:6379") == "from environment"
    environment.setenv("RAY_AUTH_MODE", "disabled")
    assert _token("auto") == ""


@pytest.mark.parametrize(
    ("token", "mode", "says"),
    [
        (None, None, "no token is found here"),
        ("t", None, "sent only with RAY_AUTH_MODE=token"),
        ("t", "token", "is not the cluster's"),
    ],
)
def test_refusal_says_what_is_wrong_with_the_token(
    environment: pytest.MonkeyPatch, token: str | None, mode: str | None, says: str
) -> None:
    if token:
        environment.setenv("RAY_AUTH_TOKEN", token)
    if mode:
        environment.setenv("RAY_AUTH_MODE", mode)
    assert says in str(attach_module._refused("10.0.0.1:6379"))
