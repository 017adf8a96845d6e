"""Every process that moves chunks tunes its allocator before it does anything else."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from typer.testing import CliRunner

import evaluation.actor
import services.memory
import services.replay.shard
import services.target.actor
import trainer.rank
from trainer.cli import app


class Tuned(BaseException):
    """Raised in place of the tuning: nothing after it runs."""


def tune() -> None:
    raise Tuned


ACTORS: dict[str, tuple[Any, Callable[[], object]]] = {
    "target": (services.target.actor, lambda: services.target.actor.TargetServer(None)),  # type: ignore[arg-type]
    "shard": (
        services.replay.shard,
        lambda: services.replay.shard.ReplayShard("redis://nowhere", "p", None, None),  # type: ignore[arg-type]
    ),
    "rank": (trainer.rank, lambda: trainer.rank.TrainerRank(*[None] * 10)),  # type: ignore[arg-type]
    "evaluator": (evaluation.actor, lambda: evaluation.actor.EvaluatorActor("m", [], None)),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("name", ACTORS)
def test_actor_tunes_its_allocator_first(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, begin = ACTORS[name]
    monkeypatch.setattr(module, "keep_freed_memory", tune)
    with pytest.raises(Tuned):
        begin()


@pytest.mark.parametrize(
    "command",
    [
        ["target", "serve", "no-such-model", "--host", "0.0.0.0"],
        ["replay", "serve", "--redis", "no-url", "--host", "0.0.0.0"],
    ],
)
def test_command_that_serves_tunes_its_allocator_first(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(services.memory, "keep_freed_memory", tune)
    with pytest.raises(Tuned):  # and does not get as far as to refuse what is wrong with the command
        CliRunner().invoke(app, command)


HEAP_BYTES = """
import sys
from services.memory import keep_freed_memory
if sys.argv[1] == "tuned":
    keep_freed_memory()
blocks = [bytearray(100_000) for _ in range(60)]
begin, end = next(line.split()[0].split("-") for line in open("/proc/self/maps") if line.endswith("[heap]\\n"))
print(int(end, 16) - int(begin, 16))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="needs Linux")
def test_tuned_process_takes_memory_from_the_kernel_in_large_steps() -> None:
    sizes = {how: int(subprocess.check_output([sys.executable, "-c", HEAP_BYTES, how])) for how in ("tuned", "default")}
    assert sizes["default"] < 64 * 1024**2 <= sizes["tuned"]
