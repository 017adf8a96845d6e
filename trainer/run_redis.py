"""The Redis of a run: an embedded one that the driver keeps alive, or the user's own."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

from services.replay.config import EMBEDDED, ReplayConfig
from services.replay.connect import check_server, claim, connect
from services.replay.embedded import EmbeddedRedis
from services.replay.urls import with_password
from trainer.output import OutputDir


class RunRedis(NamedTuple):
    """Where a run's replay buffer is."""

    url: str
    """With its password: for `connect`, never for people."""
    keep_alive: Callable[[], str | None]
    """Call it a few times a second: starts an embedded one again if it was killed, and then says so."""


@contextlib.contextmanager
def run_redis(config: ReplayConfig, output: OutputDir, host: str | None = None) -> Iterator[RunRedis]:
    """Hold the Redis of a run; an embedded one ends with the context.

    Args:
        config: Which one, and how many bytes it must hold.
        output: Of the run.
        host: Address of this machine for parts of the run on others; None where there are none.

    Raises:
        ReplayError: The user's own does not answer, is too small, or another run uses the prefix; the embedded one
            does not start.
    """
    if config.redis == EMBEDDED:
        with EmbeddedRedis.start(output.path, config.capacity, host) as embedded:
            yield RunRedis(embedded.url, embedded.keep_alive)
        return
    url = with_password(config.redis, os.environ)
    with contextlib.closing(connect(url)) as client:
        check_server(client, config.capacity, table_prefix(output))
        with claim(client, table_prefix(output), owner=str(output.path)):
            yield RunRedis(url, lambda: None)


def table_prefix(output: OutputDir) -> str:
    """What every Redis key of a run begins with."""
    return f"slipstream:{output.run_id}"
