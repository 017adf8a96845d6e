"""A run on a password-protected Redis: the password is nowhere to be found afterwards."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

import pytest
from commands import SMALL, Command, steps_done
from own_redis import PASSWORD, own_redis

from services.replay.urls import PASSWORD_VARIABLE

Start = Callable[..., Command]

SECRETS = (PASSWORD, quote(PASSWORD, safe=""), quote(PASSWORD))


def assert_no_secret(text: str, where: str) -> None:
    assert not [secret for secret in SECRETS if secret in text], f"the password is in {where}"


def test_password_of_redis_is_nowhere(slipstream: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output_dir = tmp_path / "slipstream-demo"
    monkeypatch.setenv(PASSWORD_VARIABLE, PASSWORD)
    (tmp_path / "redis").mkdir()
    with own_redis(tmp_path / "redis") as server:
        command = slipstream("demo", "--steps", "6", "--json", *SMALL, f"replay.redis={server.url}")
        command_lines: set[str] = set()

        def has_trained() -> bool:
            command_lines.update(command.left_behind())  # as `ps` shows them
            return steps_done(output_dir) >= 1

        command.wait_until(has_trained)
        assert any("ray::TrainerRank" in line for line in command_lines)
        assert_no_secret("\n".join(command_lines), "a command line")
        summary = command.json()
        assert summary["ledger"]["balanced"]
        assert_no_secret(json.dumps(summary), "the summary")
        assert_no_secret(command.errors, "what the terminal shows")
        command.assert_nothing_left()

        monkeypatch.setenv(PASSWORD_VARIABLE, "wrong-password")
        refused = slipstream("demo", "--steps", "8", *SMALL, f"replay.redis={server.url}")
        code, _ = refused.result()
        assert code == 1
        assert "refuses the login" in " ".join(refused.errors.split())
        assert "wrong-password" not in refused.errors

    files = [path for path in output_dir.rglob("*") if path.is_file()]
    assert {"recipe.yaml", "telemetry.jsonl", "provenance.json"} <= {path.name for path in files}
    for path in files:
        content = path.read_bytes()
        assert not [secret for secret in SECRETS if secret.encode() in content], f"the password is in {path}"
