"""Starts the `slipstream` command as a user would."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from commands import Command


@pytest.fixture
def slipstream(tmp_path: Path) -> Iterator[Callable[..., Command]]:
    """Start `slipstream ARGUMENTS…` in a fresh folder; whatever is left at the end of the test is killed."""
    commands: list[Command] = []

    def start(*arguments: str) -> Command:
        commands.append(Command(list(arguments), tmp_path))
        return commands[-1]

    yield start
    for command in commands:
        command.kill()
