"""URLs of Redis: passwords are found wherever they stand, shown nowhere, and put in where they are missing."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.replay.config import ReplayConfig
from services.replay.urls import (
    PASSWORD_VARIABLE,
    hide_passwords,
    is_here,
    reachable,
    safe_url,
    with_password,
    without_password,
)


@pytest.mark.parametrize(
    ("url", "shown", "bare"),
    [
        ("redis://host:6379/0", "redis://host:6379/0", "redis://host:6379/0"),
        ("rediss://user:secret@host:6379/0", "rediss://user:***@host:6379/0", "rediss://user@host:6379/0"),
        ("redis://user@host", "redis://user@host", "redis://user@host"),
        ("redis://:p%40ss@host", "redis://:***@host", "redis://@host"),
        ("redis://:a@b:c@host", "redis://:***@host", "redis://@host"),
        ("redis://:se/cr?et#1@host:1", "redis://:***@host:1", "redis://@host:1"),
        ("unix:///tmp/redis.sock", "unix:///tmp/redis.sock", "unix:///tmp/redis.sock"),
        ("unix:///tmp/a@b/redis.sock", "unix:///tmp/a@b/redis.sock", "unix:///tmp/a@b/redis.sock"),
        (
            "unix:///tmp/r.sock?db=1&password=secret",
            "unix:///tmp/r.sock?db=1&password=***",
            "unix:///tmp/r.sock?db=1",
        ),
        (
            "unix:///tmp/r.sock?password=secret&db=1",
            "unix:///tmp/r.sock?password=***&db=1",
            "unix:///tmp/r.sock?db=1",
        ),
        ("unix://user:secret@/tmp/redis.sock", "unix://user:***@/tmp/redis.sock", "unix://user@/tmp/redis.sock"),
        ("redis://:secret@[broken", "redis://:***@[broken", "redis://@[broken"),
        ("embedded", "embedded", "embedded"),
    ],
)
def test_password_is_hidden_and_the_rest_kept(url: str, shown: str, bare: str) -> None:
    assert safe_url(url) == shown
    assert without_password(url) == bare


@pytest.mark.parametrize(
    ("url", "complete"),
    [
        ("redis://host:6379/0", "redis://:s%40%2Fcret@host:6379/0"),
        ("rediss://user@host/0", "rediss://user:s%40%2Fcret@host/0"),
        ("redis://@host", "redis://:s%40%2Fcret@host"),
        ("unix:///tmp/redis.sock", "unix://:s%40%2Fcret@/tmp/redis.sock"),
        ("redis://user:own@host", "redis://user:own@host"),
        ("unix:///tmp/redis.sock?password=own", "unix:///tmp/redis.sock?password=own"),
        ("embedded", "embedded"),
    ],
)
def test_password_of_the_environment_fills_a_url_that_has_none(url: str, complete: str) -> None:
    assert with_password(url, {PASSWORD_VARIABLE: "s@/cret"}) == complete
    assert with_password(url, {}) == with_password(url, {PASSWORD_VARIABLE: ""}) == url


def test_command_line_is_shown_without_passwords() -> None:
    command = ["run", "demo.yaml", "replay.redis=rediss://user:secret@host/0", "name=a@b"]
    assert hide_passwords(command) == ["run", "demo.yaml", "replay.redis=rediss://user:***@host/0", "name=a@b"]


def test_each_url_of_a_list_is_looked_at_by_itself():
    bare = "replay.redis=[redis://one:6379/0, rediss://me@two:6380/0,unix:///tmp/redis.sock]"
    assert hide_passwords([bare]) == [bare]
    both = "replay.redis=redis://:a,b@one/0,redis://me:c@two/0"
    assert hide_passwords([both]) == ["replay.redis=redis://:***@one/0,redis://me:***@two/0"]


def test_recipe_section_is_written_and_shown_without_its_password() -> None:
    config = ReplayConfig(redis="rediss://user:secret@host/0")
    assert config.redis == "rediss://user:secret@host/0"
    assert config.model_dump()["redis"] == config.model_dump(mode="json")["redis"] == "rediss://user@host/0"
    assert "secret" not in repr(config) + str(config) + config.model_dump_json()


def test_embedded_server_is_reached_by_its_socket_here_and_by_tcp_elsewhere(tmp_path: Path) -> None:
    here = f"unix://:pw@{tmp_path}/redis.sock?tcp=10.0.0.1:20001"
    assert reachable(here) == f"unix://:pw@{tmp_path}/redis.sock"
    assert reachable("unix://:pw@/no/such/folder/redis.sock?tcp=10.0.0.1:20001") == "redis://:pw@10.0.0.1:20001/0"


@pytest.mark.parametrize("url", ["unix:///no/such/folder/redis.sock", "redis://host/0?db=1", "embedded"])
def test_any_other_url_is_left_as_it_is(url: str) -> None:
    assert reachable(url) == url


@pytest.mark.parametrize(
    ("url", "here"),
    [
        ("unix:///tmp/redis.sock", True),
        ("redis://127.0.0.1:6379/0", True),
        ("redis://:secret@localhost/0", True),
        ("redis://192.0.2.1:6379/0", False),
        ("rediss://no-such-host.invalid:6379/0", False),
    ],
)
def test_server_is_here_if_the_kernel_says_so(url: str, here: bool):
    assert is_here(url) is here
