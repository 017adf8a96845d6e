from __future__ import annotations

import pytest
from typer.testing import CliRunner

from services.errors import UsageError
from trainer.cli import app
from trainer.commands.steer import parse_autoscale, parse_targets


@pytest.mark.parametrize(("setting", "targets"), [("targets=3", 3), ("targets=0", 0), ("targets=-1", -1)])
def test_parse_targets_reads_a_number(setting: str, targets: int) -> None:
    assert parse_targets([setting]) == targets


@pytest.mark.parametrize(
    "settings",
    [["targets"], ["targets="], ["targets=x"], ["targets=1.5"], ["ranks=2"], ["targets=1", "targets=2"], ["3"]],
)
def test_parse_targets_refuses_anything_else(settings: list[str]) -> None:
    with pytest.raises(UsageError, match=r"must be targets=N"):
        parse_targets(settings)


@pytest.mark.parametrize(
    ("settings", "is_on"),
    [
        (["autoscale=on"], True),
        (["autoscale=off"], False),
        (["autoscale=1"], None),
        (["targets=2"], None),
        (["autoscale=on", "targets=2"], None),
    ],
)
def test_parse_autoscale_reads_on_or_off(settings: list[str], is_on: bool | None) -> None:
    assert parse_autoscale(settings) is is_on


@pytest.mark.parametrize("command", ["status", "scale", "pause", "continue", "stop"])
def test_help_of_every_command(command: str) -> None:
    result = CliRunner().invoke(app, [command, "--help"])
    assert result.exit_code == 0
    assert "--address" in result.output


@pytest.mark.parametrize(
    "arguments", [["scale", "demo"], ["pause"], ["stop"], ["scale"], ["status", "--watch", "--json"]]
)
def test_wrong_usage_exits_with_2(arguments: list[str]) -> None:
    assert CliRunner().invoke(app, arguments).exit_code == 2


def test_scale_of_something_else_exits_with_2_and_says_how() -> None:
    result = CliRunner().invoke(app, ["scale", "demo", "ranks=2"])
    assert result.exit_code == 2
    assert "targets=3" in result.stderr
