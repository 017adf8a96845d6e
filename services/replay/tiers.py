"""Where a run's payloads lie: in each shard's Redis, or in shared memory beside it.

The URL of a shard's Redis says it to everyone who connects: its field `arena` names the arena that holds the payloads
of that shard's table, and without one they are in Redis.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import NamedTuple

from services.replay.arena import ArenaPlace, why_no_arena
from services.replay.arena_store import ArenaStore
from services.replay.config import Tier
from services.replay.connect import Client
from services.replay.redis_store import RedisChunkStore
from services.replay.store import ChunkStore

logger = logging.getLogger(__name__)


class TierChoice(NamedTuple):
    """Which tier a run has, and why."""

    is_shared_memory: bool
    reason: str
    """Empty where the recipe leaves no choice."""


def choose_tier(
    wanted: Tier, capacity_bytes: int, *, on_one_host: bool, why_not: Callable[[int], str] = why_no_arena
) -> TierChoice:
    """Decide on a run's tier, before anything is allocated.

    Args:
        wanted: `replay.tier`.
        capacity_bytes: Of all shards together.
        on_one_host: Whether shards and ranks can be on no other host than this one.
        why_not: Why this host cannot have an arena of some size; empty if it can.
    """
    if wanted != "auto":
        return TierChoice(wanted == "shm", "")
    if not on_one_host:
        return TierChoice(False, "replay.tier=auto takes redis: the cluster has several nodes, ranks may be on others")
    if why := why_not(capacity_bytes):
        return TierChoice(False, f"replay.tier=auto takes redis. {why}")
    return TierChoice(True, "replay.tier=auto takes shm: replay shards and trainer ranks are on one host")


def chunk_store(
    client: Client,
    prefix: str,
    *,
    tell: Callable[[str], None] = logger.warning,
    stopping: threading.Event | None = None,
) -> ChunkStore:
    """The store of a table's payloads, as the URL that the client was connected with says.

    Args:
        client: From `connect`.
        prefix: Of the table's keys.
        tell: Hears what a writer waits for.
        stopping: Ends such a wait.
    """
    if client.arena is None:
        return RedisChunkStore(client, prefix)
    return ArenaStore(client, prefix, ArenaPlace.parse(client.arena), tell=tell, stopping=stopping)
