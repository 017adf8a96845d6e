"""Names of the keys in Redis. Everything of a run lies under one prefix; the Lua scripts build the same names.

| key | type | holds |
|---|---|---|
| `P:table` | hash | signature, limits, resident and peak bytes, generation, counters |
| `P:sample:<capture>` | hash | state (`inserting`, `resident`), attempt, bytes, chunks, extents in the arena, record |
| `P:uses:<capture>` | sorted set | the k that are neither leased nor acked |
| `P:chunk:<capture>:<attempt>:<index>` | string | one payload |
| `P:freed` | list | extents of the shared-memory arena whose samples have ended, for its writer |
| `P:ready` | sorted set | captures with such a k, in the order that fifo leases them |
| `P:weights` | sorted set | the same captures, by what prioritized weighs them |
| `P:inserting` | set | captures in flight |
| `P:leases`, `P:deadlines` | hash, sorted set | lease id to what it leases, lease id to its deadline |
| `P:outcomes` | list | what became of captures, for the coordinator |
| `P:work:queue`, `P:work:jobs`, `P:work:taken` | list, hash, sorted set | the work queue |
| `P:targets` | sorted set | addresses of targets, by when they were last seen |
| `P:quarantined` | hash | addresses of those that answer wrongly, and why |
| `P:owner` | string | who runs under this prefix; expires |
| `P:telemetry` | stream | metrics and events |
"""

from __future__ import annotations

import re

import redis

SCAN_COUNT = 1000


def sample_key(prefix: str, capture: int) -> str:
    """Key of what is kept of one sample."""
    return f"{prefix}:sample:{capture}"


def inserting_key(prefix: str) -> str:
    """Key of the set of captures in flight."""
    return f"{prefix}:inserting"


def jobs_key(prefix: str) -> str:
    """Key of the work queue's jobs."""
    return f"{prefix}:work:jobs"


def outcomes_key(prefix: str) -> str:
    """Key of the list of outcomes."""
    return f"{prefix}:outcomes"


def chunk_key(prefix: str, capture: int, attempt: int, index: int) -> str:
    """Key of one chunk's payload."""
    return f"{prefix}:chunk:{capture}:{attempt}:{index}"


def table_key(prefix: str) -> str:
    """Key of a table's settings and counters."""
    return f"{prefix}:table"


def owner_key(prefix: str) -> str:
    """Key of a prefix's claim."""
    return f"{prefix}:owner"


def key_pattern(prefix: str) -> str:
    """Pattern of all keys under a prefix, for `SCAN` and `KEYS`."""
    return re.sub(r"([\[\]*?\\^])", r"\\\1", prefix) + ":*"


def destroy(client: redis.Redis, prefix: str, *, keep_claim: bool = False) -> int:
    """Remove every key under a prefix.

    Args:
        client: The Redis that holds them.
        prefix: Whose keys to remove; keys of other prefixes stay.
        keep_claim: Leave the claim, to clean up what an earlier owner left before using the prefix oneself.

    Returns:
        How many keys were removed.
    """
    pattern = key_pattern(prefix)
    kept = owner_key(prefix).encode()
    removed = 0
    batch: list[bytes] = []
    for key in client.scan_iter(match=pattern, count=SCAN_COUNT):
        if not (keep_claim and key == kept):
            batch.append(key)
        if len(batch) == SCAN_COUNT:
            removed += int(client.unlink(*batch))
            batch.clear()
    if batch:
        removed += int(client.unlink(*batch))
    return removed
