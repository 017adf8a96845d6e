"""Decoding spread over replicas on a Ray cluster: each does one piece of work after another from a common queue.

A piece is kept only when it is whole; that of a replica that died goes back to the head of the queue, and another
replica takes the dead one's place.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray

from evaluation.benchmark import BenchmarkSettings
from evaluation.replica import DecodingReplica
from evaluation.session import Decode, OnRecord
from evaluation.work import Work
from services.errors import PartDiedError
from services.placement import Ask
from services.restarts import RestartBudget
from trainer.cluster import LOOK_S, Part, ray_cluster, result_of, start_part, wait_started

NAME = "a decoding replica"

RESTARTS_A_REPLICA = 3
RESTART_WINDOW_S = 3600.0
"""More deaths than that within an hour are no accidents."""


@contextmanager
def decoding_on_replicas(
    settings: BenchmarkSettings, num_replicas: int, say: Callable[[str], None]
) -> Iterator[Decode]:
    """Start replicas on the running Ray cluster, or a local one; end them afterwards.

    Args:
        settings: How to decode; each replica asks for one GPU where they say cuda.
        num_replicas: How many.
        say: Hears when one died.

    Raises:
        PlacementError: The cluster has no place for so many.
        SlipstreamError: Target or drafter cannot be loaded.
    """
    with ray_cluster(local=False):
        replicas = Replicas(settings, num_replicas, say)
        try:
            replicas.wait_started()
            yield replicas.decode
        finally:
            replicas.close()


class Replicas:
    """A number of replicas, on a Ray that this process is attached to.

    Args:
        settings: How to decode.
        num_replicas: How many.
        say: Hears when one died.
    """

    def __init__(self, settings: BenchmarkSettings, num_replicas: int, say: Callable[[str], None]) -> None:
        self._settings = settings
        self._say = say
        self._restarts = RestartBudget(RESTARTS_A_REPLICA * num_replicas, RESTART_WINDOW_S)
        self.parts = [self._start() for _ in range(num_replicas)]

    def wait_started(self) -> None:
        """Wait until all have loaded target and drafter.

        Raises:
            PlacementError: One cannot be placed.
            SlipstreamError: What the loading raised.
        """
        wait_started(self.parts)

    def decode(self, works: Sequence[Work], on_record: OnRecord) -> None:
        """Do all pieces; see `evaluation.session.Decode`.

        Raises:
            PartDiedError: Replicas die again and again.
            SlipstreamError: What the decoding raised.
        """
        queue = deque(works)
        idle = list(self.parts)
        running: dict[Any, tuple[Part, Work | None]] = {}
        while queue or any(work for _, work in running.values()):
            while queue and idle:
                part, work = idle.pop(), queue.popleft()
                running[part.actor.decode.remote(work)] = part, work
            done, _ = ray.wait(list(running), timeout=LOOK_S)
            for future in done:
                part, ended = running.pop(future)
                try:
                    records = result_of(future, NAME)
                except PartDiedError as error:
                    if self._restarts.spend(time.monotonic()) is None:
                        raise PartDiedError(
                            f"decoding replicas died more than {self._restarts.most} times within an hour: see their "
                            "memory and Ray's logs, or lower --batch-size. The same command again decodes what is "
                            "missing"
                        ) from error
                    if ended is not None:
                        queue.appendleft(ended)
                    self._say(f"{NAME} died; another one takes its place and its samples are decoded again")
                    self.parts[self.parts.index(part)] = new = self._start()
                    running[new.started] = new, None
                    continue
                if ended is not None:
                    for record in records:
                        on_record(record)
                idle.append(part)

    def close(self) -> None:
        """End all of them."""
        for part in self.parts:
            ray.kill(part.actor)

    def _start(self) -> Part:
        ask = Ask(num_gpus=1.0 if self._settings.device == "cuda" else 0.0)
        return start_part(DecodingReplica, self._settings, ask=ask)
