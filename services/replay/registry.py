"""Which targets answer, published by the driver's watcher and read by shards; and which of them shards do not trust.

A shard that finds a target guilty of wrong answers notes it here. The driver hears of it with its next publication,
restarts the target, and publishes its address no more, which ends the quarantine of that address.
"""

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

    def publish(self, addresses: Sequence[str], now_s: float) -> dict[str, str]:
        """Note that exactly these targets answer now; others are forgotten, and so is their quarantine.

        Returns:
            Those of them that are quarantined, and why.
        """
        _, rest = self._scripts.run("publish", now_s, *addresses)
        return {address.decode(): reason.decode() for address, reason in zip(rest[::2], rest[1::2], strict=True)}

    def published(self, now_s: float, max_age_s: float) -> list[str]:
        """Targets published within the last `max_age_s`, quarantined or not, sorted."""
        addresses: Any = self._client.zrangebyscore(self._key, now_s - max_age_s, "+inf")
        return sorted(address.decode() for address in addresses)

    def live(self, now_s: float, max_age_s: float) -> list[str]:
        """Those of them that are not quarantined."""
        _, addresses = self._scripts.run("live", now_s - max_age_s)
        return sorted(address.decode() for address in addresses)

    def quarantine(self, address: str, reason: str) -> bool:
        """Have a target that answers asked by nobody until it has restarted.

        Returns:
            False if it does not answer (any more), or is quarantined already.
        """
        status, _ = self._scripts.run("quarantine", address, reason)
        return status == "OK"
