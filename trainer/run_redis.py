"""Where a run's replay buffer is: the Redis of each shard, embedded or the user's own, and shared memory beside it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import redis

from services.errors import ReplayError
from services.replay.arena import Arena
from services.replay.config import ReplayConfig
from services.replay.connect import check_server, claim, connect
from services.replay.embedded import EmbeddedRedis
from services.replay.tiers import TierChoice, choose_tier
from services.replay.urls import safe_url, with_arena, with_password
from trainer.output import OutputDir


class RunRedis(NamedTuple):
    """Where a run's replay buffer is."""

    urls: tuple[str, ...]
    """One a shard, with their passwords: for `connect`, never for people. The first is also the control Redis."""
    keep_alive: Callable[[], list[str]]
    """Call it a few times a second: starts embedded ones again that were killed, and then says so."""
    tier: TierChoice
    """Whether features lie in shared memory; then the URLs say in which."""


@contextlib.contextmanager
def run_redis(config: ReplayConfig, output: OutputDir, host: str | None = None) -> Iterator[RunRedis]:
    """Hold the Redis of each shard of a run, and its shared memory if that is the tier; they end with the context.

    Args:
        config: Which ones, and how many bytes they must hold.
        output: Of the run.
        host: Address of this machine for parts of the run on others; None where there are none.

    Raises:
        ReplayError: One of the user's own does not answer, is too small, is given twice, or another run uses the
            prefix; an embedded one does not start; there is not enough shared memory.
    """
    tier = choose_tier(config.tier, config.shards * config.shard_capacity, on_one_host=host is None)
    with contextlib.ExitStack() as stack:
        arenas = [
            stack.enter_context(Arena(config.shard_capacity))
            for _ in range(config.shards if tier.is_shared_memory else 0)
        ]
        if not config.urls:
            servers = [
                stack.enter_context(EmbeddedRedis.start(output.path, config.shard_capacity, host, number))
                for number in range(config.shards)
            ]
            yield RunRedis(_in(arenas, [server.url for server in servers]), lambda: _keep_alive(servers), tier)
            return
        urls = tuple(with_password(url, os.environ) for url in config.urls)
        clients = [stack.enter_context(contextlib.closing(connect(url))) for url in urls]
        _check_distinct(clients, urls)
        for client in clients:
            check_server(client, 0 if arenas else config.shard_capacity, table_prefix(output))
            stack.enter_context(claim(client, table_prefix(output), owner=str(output.path)))
        yield RunRedis(_in(arenas, urls), list, tier)


def table_prefix(output: OutputDir) -> str:
    """What every Redis key of a run begins with."""
    return f"slipstream:{output.run_id}"


def _in(arenas: Sequence[Arena], urls: Sequence[str]) -> tuple[str, ...]:
    """The URL of each shard, with its arena if the run has them."""
    if not arenas:
        return tuple(urls)
    return tuple(with_arena(url, arena.place.text) for url, arena in zip(urls, arenas, strict=True))


def _keep_alive(servers: Sequence[EmbeddedRedis]) -> list[str]:
    return [news for server in servers if (news := server.keep_alive())]


def _check_distinct(clients: Sequence[redis.Redis], urls: Sequence[str]) -> None:
    """Refuse one server under two URLs: its shards would share its memory, and fall with it together."""
    seen: dict[str, str] = {}
    for client, url in zip(clients, urls, strict=True):
        identity = str(client.info("server")["run_id"])
        if identity in seen:
            raise ReplayError(
                f"replay.redis: {safe_url(seen[identity])} and {safe_url(url)} are one server; every shard has a "
                "Redis of its own. List different ones, or lower replay.shards"
            )
        seen[identity] = url
