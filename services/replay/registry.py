"""Which targets answer, published by the driver's watcher and read by shards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import redis

from services.replay.scripts import Scripts


class TargetRegistry:
    """Addresses of targets, each with the time it was last seen."""

    def __init__(self, client: redis.Redis, prefix: str) -> None:
        """Attach to the registry under `prefix`."""
        self._client = client
        self._scripts = Scripts(client, prefix)
        self._key = f"{prefix}:targets"

    def publish(self, addresses: Sequence[str], now_s: float) -> None:
        """Note that exactly these targets answer now; others are forgotten."""
        self._scripts.run("publish", now_s, *addresses)

    def live(self, now_s: float, max_age_s: float) -> list[str]:
        """Targets published within the last `max_age_s`, sorted."""
        addresses: Any = self._client.zrangebyscore(self._key, now_s - max_age_s, "+inf")
        return sorted(address.decode() for address in addresses)
