"""Connections to the tables of a run: one Redis and one table a shard, numbered from 0.

The first shard's Redis is also the control Redis: telemetry is there. Whatever belongs to a shard (its table, its work
queue, the targets that it may ask) lies in its own Redis, so that a shard that is lost takes nothing of another along.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from services.contracts import TableInfo
from services.replay.connect import Client, connect
from services.replay.protocol import CaptureQueue, ReplayTable
from services.replay.registry import TargetRegistry
from services.replay.table import RedisTable
from services.replay.urls import is_here
from services.replay.work import WorkQueue


class ShardLink(NamedTuple):
    """One shard of a run, as others than its own process see it."""

    number: int
    client: Client
    table: ReplayTable
    queue: CaptureQueue
    registry: TargetRegistry
    is_local: bool
    """Whether its Redis is on this machine."""


def link_shards(urls: str | Sequence[str], prefix: str) -> tuple[ShardLink, ...]:
    """Connect to every shard.

    Args:
        urls: One a shard; a text alone is a single shard's.
        prefix: Of the run's keys, the same in each.

    Raises:
        ReplayUnavailableError: A Redis does not answer; those that do are disconnected.
    """
    links: list[ShardLink] = []
    try:
        for number, url in enumerate([urls] if isinstance(urls, str) else urls):
            client = connect(url)
            links.append(
                ShardLink(
                    number,
                    client,
                    RedisTable(client, prefix),
                    WorkQueue(client, prefix),
                    TargetRegistry(client, prefix),
                    is_here(client.url),
                )
            )
    except BaseException:
        close_links(links)
        raise
    return tuple(links)


def close_links(links: Iterable[ShardLink]) -> None:
    """Close the connections."""
    for link in links:
        link.table.close()
        link.client.close()


def shard_of(capture: int, num_shards: int) -> int:
    """The shard of a capture where the plan alone decides (deterministic mode): the same for whoever asks."""
    return capture % num_shards


def sum_infos(infos: Sequence[TableInfo]) -> TableInfo:
    """Several tables as one. `peak_bytes` is an upper bound: each had its peak at its own moment.

    Args:
        infos: At least one; of tables with the same settings.
    """
    first = infos[0]
    if len(infos) == 1:
        return first
    added = (
        "resident_bytes",
        "peak_bytes",
        "wanted_bytes",
        "capacity_bytes",
        "num_ready",
        "num_ready_uses",
        "num_leased",
        "num_inserting",
        "inserts",
        "samples",
        "deletes",
        "min_size",
        "difference",
    )
    return first.model_copy(
        update={
            **{name: sum(getattr(info, name) for info in infos) for name in added},
            "sealed": all(info.sealed for info in infos),
            "generation": min(info.generation for info in infos),
            "min_diff": None if first.min_diff is None else sum(info.min_diff or 0 for info in infos),
            "max_diff": None if first.max_diff is None else sum(info.max_diff or 0 for info in infos),
            "can_insert": any(info.can_insert for info in infos),
            "can_sample": any(info.can_sample for info in infos),
        }
    )
