import queue
import threading
import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from waiting import wait_until

from services.contracts import StepLease
from services.errors import DeadlineError, PausedError
from trainer import prefetch as prefetch_module
from trainer.prefetch import Prefetcher, Room

DEADLINE_S = 120.0
MIB = 2**20


class Steps:
    """Grants steps with the given numbers of micro-batches, then END."""

    def __init__(self, *sizes: int, captures: tuple[tuple[tuple[int, ...], ...], ...] | None = None) -> None:
        self.sizes = sizes
        self.captures = captures
        self.asked: list[int] = []

    def step_lease(self, step: int) -> StepLease:
        self.asked.append(step)
        size = self.sizes[step - 1] if step <= len(self.sizes) else 0
        return StepLease(step=step, num_micro_batches=size, captures=self.captures if size else None)


class Batch(NamedTuple):
    number: int
    num_bytes: int = MIB

    def wait_until_there(self) -> None:
        pass


class Counter:
    """Makes micro-batches 0, 1, 2, … of the given sizes, then of 1 MiB."""

    def __init__(self, *sizes: int) -> None:
        self.sizes = sizes
        self.made = 0
        self.captures: list[Sequence[int] | None] = []
        self.num_left: list[int] = []

    def load(self, captures: Sequence[int] | None, num_left: int, room: Room) -> Batch:
        size = self.sizes[self.made] if self.made < len(self.sizes) else MIB
        self.captures.append(captures)
        self.num_left.append(num_left)
        if room.wait_for(size):
            self.made += 1
        return Batch(self.made - 1, size)


class Clock:
    """Time that passes where a test says so, and whether the loop waits for the thread."""

    def __init__(self) -> None:
        self.s = 0.0
        self.loop_waits = threading.Event()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()

    class WatchedQueue(queue.SimpleQueue[Any]):
        def get(self) -> Any:  # type: ignore[override]
            clock.loop_waits.set()
            item = super().get()
            clock.loop_waits.clear()
            return item

    monkeypatch.setattr(prefetch_module, "time", SimpleNamespace(perf_counter=lambda: clock.s))
    monkeypatch.setattr(prefetch_module, "queue", SimpleNamespace(SimpleQueue=WatchedQueue))
    return clock


def numbers(items: object) -> list[int]:
    return [item.number for item in items]  # type: ignore[attr-defined]


def test_steps_come_in_order_with_their_micro_batches_until_end() -> None:
    source, counter = Steps(2, 1, 3), Counter()
    with Prefetcher(source, counter.load, depth_bytes=2 * MIB, first_step=1, rank=0) as batches:
        seen = [(lease.step, numbers(items)) for lease, items in batches.steps()]
    assert seen == [(1, [0, 1]), (2, [2]), (3, [3, 4, 5])]
    assert source.asked == [1, 2, 3, 4]
    assert counter.num_left == [2, 1, 1, 3, 2, 1]


def test_resumed_run_asks_for_its_first_step_only() -> None:
    source = Steps(1, 1, 1)
    with Prefetcher(source, Counter().load, depth_bytes=MIB, first_step=3, rank=0) as batches:
        assert [lease.step for lease, _ in batches.steps()] == [3]
    assert source.asked == [3, 4]


def test_thread_runs_ahead_by_the_depth_and_no_more() -> None:
    counter = Counter(2 * MIB, MIB, MIB // 2, MIB)
    with Prefetcher(Steps(100), counter.load, depth_bytes=4 * MIB, first_step=1, rank=0) as batches:
        wait_until(lambda: len(counter.captures) == 4, "three batches made, a fourth asked for")
        assert counter.made == 3, "3.5 of 4 MiB are ahead, and the next has 1"
        _, items = next(batches.steps())
        assert next(items).number == 0
        wait_until(lambda: counter.made == 5, "room for two more of 1 MiB: 3.5 again")
        wait_until(lambda: len(counter.captures) == 6, "a sixth batch asked for")
        assert counter.made == 5


def test_one_micro_batch_is_ahead_however_large() -> None:
    counter = Counter(9 * MIB, 9 * MIB, 9 * MIB)
    with Prefetcher(Steps(100), counter.load, depth_bytes=MIB, first_step=1, rank=0) as batches:
        wait_until(lambda: len(counter.captures) == 2, "one batch made, a second asked for")
        assert counter.made == 1
        _, items = next(batches.steps())
        assert next(items).number == 0
        wait_until(lambda: counter.made == 2, "the second one, while the first one trains")


def test_thread_goes_on_into_the_next_step() -> None:
    """While the loop is in its first step, micro-batches of the third are made."""
    source, counter = Steps(1, 1, 1), Counter()
    with Prefetcher(source, counter.load, depth_bytes=9 * MIB, first_step=1, rank=0) as batches:
        next(batches.steps())
        wait_until(lambda: counter.made == 3, "three batches made")
        wait_until(lambda: source.asked == [1, 2, 3, 4], "the end asked for")


def test_batch_that_is_still_being_copied_is_waited_for(clock: Clock) -> None:
    class Copying(Batch):
        def wait_until_there(self) -> None:
            clock.s += 3.0

    def load(captures: Sequence[int] | None, num_left: int, room: Room) -> Batch:
        return Copying(0)

    with Prefetcher(Steps(1), load, depth_bytes=MIB, first_step=1, rank=0) as batches:
        next(batches.steps())
        assert batches.take_wait_s() == 3.0


def test_room_counts_what_is_ahead() -> None:
    room = Room(10)
    assert room.wait_for(11)
    room.add(11)
    assert room.free_bytes == -1
    room.remove(11)
    room.add(4)
    assert room.wait_for(6)
    threading.Timer(0.05, lambda: room.remove(4)).start()
    assert room.wait_for(7)
    assert room.free_bytes == 10


def test_closed_room_has_no_place() -> None:
    room = Room(10)
    room.add(10)
    threading.Timer(0.05, room.close).start()
    assert not room.wait_for(1)


def test_named_captures_go_to_their_rank() -> None:
    counter = Counter()
    source = Steps(2, captures=(((0, 1), (2,)), ((3, 4), ())))
    with Prefetcher(source, counter.load, depth_bytes=2 * MIB, first_step=1, rank=1) as batches:
        assert [numbers(items) for _, items in batches.steps()] == [[0, 1]]
    assert counter.captures == [(3, 4), ()]


def test_error_of_the_thread_is_raised_in_the_loop() -> None:
    def load(captures: Sequence[int] | None, num_left: int, room: Room) -> Batch:
        raise DeadlineError("no samples")

    with (
        Prefetcher(Steps(1), load, depth_bytes=MIB, first_step=1, rank=0) as batches,
        pytest.raises(DeadlineError, match="no samples"),
    ):
        next(batches.steps())


def test_leaving_cancels_a_wait() -> None:
    waiting = threading.Event()

    def load(captures: Sequence[int] | None, num_left: int, room: Room) -> Batch:
        waiting.set()
        assert room.closed.wait(DEADLINE_S)
        return Batch(0)

    with Prefetcher(Steps(1), load, depth_bytes=MIB, first_step=1, rank=0) as batches:
        assert waiting.wait(DEADLINE_S)
    wait_until(lambda: not batches._thread.is_alive(), "the end of the thread", DEADLINE_S / 2)


def test_wait_is_counted_and_reset_when_taken(clock: Clock) -> None:
    def load(captures: Sequence[int] | None, num_left: int, room: Room) -> Batch:
        assert clock.loop_waits.wait(DEADLINE_S)
        clock.s += 3.0
        return Batch(0)

    with Prefetcher(Steps(1), load, depth_bytes=MIB, first_step=1, rank=0) as batches:
        next(batches.steps())
        assert batches.take_wait_s() == 3.0
        assert batches.take_wait_s() == 0.0


class PausedSteps(Steps):
    """Refuses every step but the first while `paused`, as a coordinator does: after a little wait."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.paused = True

    def step_lease(self, step: int) -> StepLease:
        if self.paused and step > 1:
            self.refuse()
            raise PausedError("the run is paused")
        return super().step_lease(step)

    def refuse(self) -> None:
        time.sleep(0.02)


def test_pause_is_waited_out_and_is_no_wait_for_the_buffer(clock: Clock) -> None:
    first_is_taken = threading.Event()

    class Pausing(PausedSteps):
        num_refused = 0

        def refuse(self) -> None:
            assert first_is_taken.wait(DEADLINE_S)
            assert clock.loop_waits.wait(DEADLINE_S)
            clock.s += 0.25
            self.num_refused += 1
            self.paused = self.num_refused < 4

    def load(captures: Sequence[int] | None, num_left: int, room: Room) -> Batch:
        clock.s += 0.125
        return counter.load(captures, num_left, room)

    counter = Counter()
    with Prefetcher(Pausing(1, 1), load, depth_bytes=MIB, first_step=1, rank=0) as batches:
        steps = batches.steps()
        _, first = next(steps)
        assert numbers(first) == [0]
        batches.take_wait_s()
        first_is_taken.set()
        _, second = next(steps)
        assert numbers(second) == [1]
        assert batches.take_paused_s() == 1.0, "the loop stood still"
        assert batches.take_wait_s() == 0.125, "and waited for what was made after the pause"
        assert batches.take_paused_s() == 0.0


def test_late_answer_that_the_run_goes_on_is_part_of_the_pause() -> None:
    taking = threading.Event()

    class LateAnswer(Steps):
        def step_lease(self, step: int) -> StepLease:
            if step == 2 and not refused:
                refused.append(step)
                raise PausedError("the run is paused")
            if step == 2:
                assert taking.wait(DEADLINE_S)
                began_s = time.perf_counter()
                wait_until(lambda: time.perf_counter() > began_s + 0.2, "an answer that takes its time")
            return super().step_lease(step)

    class Queue:
        """Tells when the loop asks for something."""

        def __init__(self, plain: Any) -> None:
            self.put, self._plain = plain.put, plain

        def get(self) -> Any:
            taking.set()
            return self._plain.get()

    refused: list[int] = []
    with Prefetcher(LateAnswer(1, 1), Counter().load, depth_bytes=MIB, first_step=1, rank=0) as batches:
        steps = batches.steps()
        _, first = next(steps)
        assert numbers(first) == [0]
        batches.take_wait_s()
        batches._queue = Queue(batches._queue)  # type: ignore[assignment]
        _, second = next(steps)
        assert numbers(second) == [1]
        assert batches.take_paused_s() > 0.2


def test_paused_prefetcher_stops_at_once() -> None:
    with Prefetcher(PausedSteps(1, 1), Counter().load, depth_bytes=MIB, first_step=2, rank=0) as batches:
        thread = batches._thread
    wait_until(lambda: not thread.is_alive(), "the end of the thread")
