"""Micro-batches made ready while the step before runs: leased, fetched, decoded and collated by one thread.

The queue holds at most `depth` micro-batches. With the one that trains and the one that is being completed, a rank
holds the bytes of depth + 2 micro-batches at once.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from types import TracebackType
from typing import Generic, Protocol, Self, TypeVar

from services.contracts import StepLease
from services.errors import PausedError

Batch = TypeVar("Batch")

POLL_S = 0.2
"""How often a waiting thread looks whether it should stop."""

STOP_DEADLINE_S = 5.0
"""How long the thread may take to stop; it is a daemon, so an answer that never comes cannot keep the process."""


class LeaseSource(Protocol):
    """Where step leases come from: the coordinator."""

    def step_lease(self, step: int) -> StepLease:
        """What to do in a step; the same for every rank.

        Raises:
            PausedError: The run is paused, and was so for about a second: ask again.
        """
        ...


class Prefetcher(Generic[Batch]):
    """Runs ahead of the training loop by a bounded number of micro-batches.

    Args:
        coordinator: Grants the steps.
        load: Makes one micro-batch: takes the captures to use (None: whatever is ready) and what ends its
            wait early.
        depth: Most micro-batches that wait in the queue.
        first_step: Number of the first step to ask for.
        rank: Whose captures to take in deterministic mode.
    """

    def __init__(
        self,
        coordinator: LeaseSource,
        load: Callable[[Sequence[int] | None, threading.Event], Batch],
        *,
        depth: int,
        first_step: int,
        rank: int,
    ) -> None:
        self._coordinator = coordinator
        self._load = load
        self._first_step = first_step
        self._rank = rank
        self._queue: queue.Queue[tuple[StepLease, Batch | None] | BaseException] = queue.Queue(depth)
        self._stop = threading.Event()
        self._wait_s = 0.0
        self._loop_paused_s = 0.0
        self._paused_s = 0.0
        """Seconds for which the thread was refused a step because the run is paused."""
        self._thread = threading.Thread(target=self._run, name="prefetch", daemon=True)
        self._thread.start()

    def steps(self) -> Iterator[tuple[StepLease, Iterator[Batch]]]:
        """Each granted step with its micro-batches, until END. Take all of a step before going on to the next.

        Raises:
            Exception: Whatever the thread failed with.
        """
        while True:
            lease, batch = self._take()
            if batch is None:
                return
            rest = (self._take()[1] for _ in range(lease.num_micro_batches - 1))
            yield lease, (item for item in chain([batch], rest) if item is not None)

    def take_wait_s(self) -> float:
        """Seconds that the loop has waited since the last call; a pause is no wait."""
        waited_s, self._wait_s = self._wait_s, 0.0
        return waited_s

    def take_paused_s(self) -> float:
        """Seconds for which the loop stood still since the last call because the run was paused."""
        paused_s, self._loop_paused_s = self._loop_paused_s, 0.0
        return paused_s

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop the thread. Leases it still holds end with their trainer group."""
        self._stop.set()
        self._thread.join(STOP_DEADLINE_S)

    def _take(self) -> tuple[StepLease, Batch | None]:
        started_s, paused_before_s = time.perf_counter(), self._paused_s
        item = self._queue.get()
        waited_s = time.perf_counter() - started_s
        paused_s = min(waited_s, self._paused_s - paused_before_s)
        self._wait_s += waited_s - paused_s
        self._loop_paused_s += paused_s
        if isinstance(item, BaseException):
            raise item
        return item

    def _run(self) -> None:
        try:
            self._fill()
        except Exception as error:  # handed to the loop, which raises it
            self._put(error)

    def _fill(self) -> None:
        step = self._first_step
        while not self._stop.is_set():
            lease = self._ask_lease(step)
            if lease is None:
                return
            if lease.is_end:
                self._put((lease, None))
                return
            for index in range(lease.num_micro_batches):
                captures = None if lease.captures is None else lease.captures[self._rank][index]
                self._put((lease, self._load(captures, self._stop)))
                if self._stop.is_set():
                    return
            step += 1

    def _ask_lease(self, step: int) -> StepLease | None:
        """The lease of a step, however long the run is paused before it; None if the thread shall stop."""
        while not self._stop.is_set():
            asked_s = time.perf_counter()
            try:
                return self._coordinator.step_lease(step)
            except PausedError:
                self._paused_s += time.perf_counter() - asked_s
        return None

    def _put(self, item: tuple[StepLease, Batch | None] | BaseException) -> None:
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=POLL_S)
                return
            except queue.Full:
                continue
