"""Micro-batches made ready while the steps before them run: leased, read, decoded and copied by one thread.

The bound is on bytes: what is ready and not yet taken by the loop, packed as it is trained, stays within a depth, of
which one micro-batch may always be ahead, however large. With the one that trains and the one whose samples are leased
but wait for their room, a rank has at most the depth and two micro-batches out of the buffer at once.

The thread does not stop at the end of a step: it asks for the next step's lease while the loop is still in this one.
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


class Prefetchable(Protocol):
    """What is made ready."""

    @property
    def num_bytes(self) -> int:
        """How much room it takes until the loop takes it."""
        ...

    def wait_until_there(self) -> None:
        """Wait until a copy that its making began is done."""
        ...


Batch = TypeVar("Batch", bound=Prefetchable)


class Room:
    """How many bytes may be ahead of the loop, and are.

    Args:
        depth_bytes: The most, but for a single micro-batch that is larger.
    """

    def __init__(self, depth_bytes: int) -> None:
        self.depth_bytes = depth_bytes
        self.closed = threading.Event()
        """Set once nothing more shall be made; ends every wait."""
        self._changed = threading.Condition()
        self._ahead_bytes = 0

    @property
    def free_bytes(self) -> int:
        """Below 0 where a single micro-batch is larger than the depth."""
        with self._changed:
            return self.depth_bytes - self._ahead_bytes

    def wait_for(self, num_bytes: int) -> bool:
        """Wait until so many bytes more fit, or nothing is ahead; they are not counted yet. False once closed."""
        with self._changed:
            self._changed.wait_for(
                lambda: (
                    self.closed.is_set() or self._ahead_bytes == 0 or self._ahead_bytes + num_bytes <= self.depth_bytes
                )
            )
        return not self.closed.is_set()

    def add(self, num_bytes: int) -> None:
        """So many bytes more are ahead."""
        with self._changed:
            self._ahead_bytes += num_bytes

    def remove(self, num_bytes: int) -> None:
        """The loop has taken so many bytes."""
        with self._changed:
            self._ahead_bytes -= num_bytes
            self._changed.notify_all()

    def close(self) -> None:
        """Nothing more shall be made."""
        with self._changed:
            self.closed.set()
            self._changed.notify_all()


class Prefetcher(Generic[Batch]):
    """Runs ahead of the training loop by a bounded number of bytes.

    Args:
        coordinator: Grants the steps.
        load: Makes the next micro-batch of a step once there is room for it: takes the captures to use (None: whatever
            is ready), how many micro-batches of the step are left, this one included, and the room. What it returns
            once the room is closed is thrown away.
        depth_bytes: Most bytes that are ready ahead of the loop.
        first_step: Number of the first step to ask for.
        rank: Whose captures to take in deterministic mode.
    """

    def __init__(
        self,
        coordinator: LeaseSource,
        load: Callable[[Sequence[int] | None, int, Room], Batch],
        *,
        depth_bytes: int,
        first_step: int,
        rank: int,
    ) -> None:
        self._coordinator = coordinator
        self._load = load
        self._first_step = first_step
        self._rank = rank
        self._room = Room(depth_bytes)
        self._queue: queue.SimpleQueue[tuple[StepLease, Batch | None] | BaseException] = queue.SimpleQueue()
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
        self._room.close()
        self._thread.join(STOP_DEADLINE_S)

    def _take(self) -> tuple[StepLease, Batch | None]:
        started_s, paused_before_s = time.perf_counter(), self._paused_s
        item = self._queue.get()
        if isinstance(item, BaseException):
            raise item
        _, batch = item
        if batch is not None:
            self._room.remove(batch.num_bytes)
            batch.wait_until_there()
        waited_s = time.perf_counter() - started_s
        paused_s = min(waited_s, self._paused_s - paused_before_s)
        self._wait_s += waited_s - paused_s
        self._loop_paused_s += paused_s
        return item

    def _run(self) -> None:
        try:
            self._fill()
        except Exception as error:  # handed to the loop, which raises it
            self._queue.put(error)

    def _fill(self) -> None:
        step = self._first_step
        while not self._room.closed.is_set():
            lease = self._ask_lease(step)
            if lease is None:
                return
            if lease.is_end:
                self._queue.put((lease, None))
                return
            for index in range(lease.num_micro_batches):
                captures = None if lease.captures is None else lease.captures[self._rank][index]
                batch = self._load(captures, lease.num_micro_batches - index, self._room)
                if self._room.closed.is_set():
                    return
                self._room.add(batch.num_bytes)
                self._queue.put((lease, batch))
            step += 1

    def _ask_lease(self, step: int) -> StepLease | None:
        """The lease of a step, however long the run is paused before it; None if the thread shall stop."""
        is_paused = False
        while not self._room.closed.is_set():
            asked_s = time.perf_counter()
            try:
                return self._coordinator.step_lease(step)
            except PausedError:
                is_paused = True
            finally:
                if is_paused:  # the answer that the run goes on ends a wait for that, too
                    self._paused_s += time.perf_counter() - asked_s
        return None
