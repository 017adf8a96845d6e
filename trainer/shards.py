"""The replay shards of a run as the driver sees them: their tables, and the actors that fill them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import redis

from services.contracts import TableInfo, TableSignature
from services.errors import PartDiedError, ReplayUnavailableError, SlipstreamError
from services.replay.config import ReplayConfig
from services.replay.links import close_links, link_shards, sum_infos
from trainer.cluster import Part, result_of, wait_started
from trainer.parts import Parts
from trainer.supervision import Restarts, persist


class Shards:
    """All shards of one attempt of a run.

    Args:
        urls: The Redis of each.
        prefix: Of the run's keys in them.
        parts: Starts the actors and ends them.
        look: Called while something is waited for.
    """

    def __init__(self, urls: Sequence[str], prefix: str, parts: Parts, look: Callable[[], None]) -> None:
        self._links = link_shards(urls, prefix)
        self._parts = parts
        self._look = look
        self._actors: list[Part] = []
        self._filling: dict[Any, int] = {}
        """The calls that the actors work in, and which one's each is."""
        self._restarts = [Restarts(self._name(number)) for number in range(len(self._links))]

    @property
    def control(self) -> redis.Redis:
        """The Redis of the first shard: telemetry is there."""
        return self._links[0].client

    def make_tables(self, replay: ReplayConfig, signature: TableSignature, generation: int) -> None:
        """Make every table anew; what a killed attempt left in a user's own Redis can all be made again.

        Raises:
            ReplayUnavailableError: A Redis does not answer.
        """
        for link in self._links:
            link.table.destroy()
            link.table.create(replay.shard_capacity, signature, replay.reuse, replay.rate_limiter, replay.sampling)
            link.table.set_generation(generation)

    def start(self) -> None:
        """Place the actors."""
        self._actors = [self._parts.shard(link.number) for link in self._links]

    def fill(self) -> None:
        """Let the actors, which have started, fill their tables."""
        self._filling = {actor.actor.run.remote(): number for number, actor in enumerate(self._actors)}

    @property
    def calls(self) -> list[Any]:
        """What comes back only if an actor loses its process or fails; hand it to `take`."""
        return list(self._filling)

    def take(self, call: Any) -> str:
        """Take a call that came back: where its actor lost its process another one is put beside the table.

        That adopts the samples, and takes the jobs of the dead one back.

        Returns:
            What happened, for the run's events.

        Raises:
            SlipstreamError: The actor failed, or died too often.
        """
        number = self._filling.pop(call)
        name = self._name(number)
        try:
            result_of(call, name)
        except PartDiedError as error:
            self._restarts[number].count(time.monotonic(), error)
            self._parts.drop(self._actors[number])
            self._actors[number] = persist(lambda: self._started(number), self._look)
            self._filling[self._actors[number].actor.run.remote()] = number
            return f"{name} lost its process; another one takes over what is in the buffer"
        raise SlipstreamError(f"{name} ended before training did")

    def publish(self, addresses: Sequence[str]) -> dict[str, str]:
        """Tell every shard which targets answer now.

        Returns:
            Those that a shard does not trust, and why.

        Raises:
            ReplayUnavailableError: A Redis does not answer; the others have heard it.
        """
        quarantined: dict[str, str] = {}
        failure: ReplayUnavailableError | None = None
        for link in self._links:
            try:
                quarantined |= link.registry.publish(addresses, time.time())
            except ReplayUnavailableError as error:
                failure = error
        if failure is not None and not quarantined:
            raise failure
        return quarantined

    def infos(self) -> list[TableInfo]:
        """Every table's state now.

        Raises:
            ReplayUnavailableError: A Redis does not answer.
            TableLostError: A table is not there.
        """
        return [link.table.info() for link in self._links]

    def info(self) -> TableInfo:
        """All tables as one; their peak is at most what it says."""
        return sum_infos(self.infos())

    def destroy(self) -> None:
        """Remove what lies in every Redis that is still there."""
        for link in self._links:
            with contextlib.suppress(ReplayUnavailableError):
                link.table.destroy()

    def close(self) -> None:
        """Close the connections."""
        close_links(self._links)

    def _started(self, number: int) -> Part:
        actor = self._parts.shard(number)
        try:
            wait_started([actor], self._look)
        except SlipstreamError:
            self._parts.drop(actor)
            raise
        return actor

    def _name(self, number: int) -> str:
        return f"replay shard {number}" if len(self._links) > 1 else "the replay shard"
