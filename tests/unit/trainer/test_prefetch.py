import threading
import time
from collections.abc import Sequence

import pytest
from waiting import wait_until

from services.contracts import StepLease
from services.errors import DeadlineError, PausedError
from trainer.prefetch import Prefetcher

DEADLINE_S = 10.0


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


class Counter:
    """Makes micro-batches 0, 1, 2, …"""

    def __init__(self) -> None:
        self.made = 0
        self.captures: list[Sequence[int] | None] = []

    def load(self, captures: Sequence[int] | None, cancelled: threading.Event) -> int:
        self.captures.append(captures)
        self.made += 1
        return self.made - 1


def test_steps_come_in_order_with_their_micro_batches_until_end() -> None:
    source, counter = Steps(2, 1, 3), Counter()
    with Prefetcher(source, counter.load, depth=2, first_step=1, rank=0) as batches:
        seen = [(lease.step, list(items)) for lease, items in batches.steps()]
    assert seen == [(1, [0, 1]), (2, [2]), (3, [3, 4, 5])]
    assert source.asked == [1, 2, 3, 4]


def test_resumed_run_asks_for_its_first_step_only() -> None:
    source = Steps(1, 1, 1)
    with Prefetcher(source, Counter().load, depth=1, first_step=3, rank=0) as batches:
        assert [lease.step for lease, _ in batches.steps()] == [3]
    assert source.asked == [3, 4]


def test_thread_runs_ahead_by_the_depth_and_one() -> None:
    counter = Counter()
    with Prefetcher(Steps(100), counter.load, depth=3, first_step=1, rank=0) as batches:
        wait_until(lambda: counter.made == 4, "four batches made")  # three wait in the queue, one is held by the thread
        _, items = next(batches.steps())
        assert next(items) == 0
        wait_until(lambda: counter.made == 5, "a fifth batch")
    assert counter.made == 5


def test_named_captures_go_to_their_rank() -> None:
    counter = Counter()
    source = Steps(2, captures=(((0, 1), (2,)), ((3, 4), ())))
    with Prefetcher(source, counter.load, depth=2, first_step=1, rank=1) as batches:
        assert [list(items) for _, items in batches.steps()] == [[0, 1]]
    assert counter.captures == [(3, 4), ()]


def test_error_of_the_thread_is_raised_in_the_loop() -> None:
    def load(captures: Sequence[int] | None, cancelled: threading.Event) -> int:
        raise DeadlineError("no samples")

    with (
        Prefetcher(Steps(1), load, depth=1, first_step=1, rank=0) as batches,
        pytest.raises(DeadlineError, match="no samples"),
    ):
        next(batches.steps())


def test_leaving_cancels_a_wait() -> None:
    waiting = threading.Event()

    def load(captures: Sequence[int] | None, cancelled: threading.Event) -> int:
        waiting.set()
        assert cancelled.wait(DEADLINE_S)
        return 0

    with Prefetcher(Steps(1), load, depth=1, first_step=1, rank=0):
        assert waiting.wait(DEADLINE_S)
    assert not any(thread.name == "prefetch" for thread in threading.enumerate())


def test_wait_is_counted_and_reset_when_taken() -> None:
    release = threading.Event()

    def load(captures: Sequence[int] | None, cancelled: threading.Event) -> int:
        release.wait(DEADLINE_S)
        return 0

    with Prefetcher(Steps(1), load, depth=1, first_step=1, rank=0) as batches:
        threading.Timer(0.1, release.set).start()
        next(batches.steps())
        assert 0.05 < batches.take_wait_s() < DEADLINE_S
        assert batches.take_wait_s() == 0.0


class PausedSteps(Steps):
    """Refuses every step but the first while `paused`, as a coordinator does: after a little wait."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.paused = True
        self.num_refused = 0

    def step_lease(self, step: int) -> StepLease:
        if self.paused and step > 1:
            time.sleep(0.02)
            self.num_refused += 1
            raise PausedError("the run is paused")
        return super().step_lease(step)


def test_pause_is_waited_out_and_is_no_wait_for_the_buffer() -> None:
    coordinator = PausedSteps(1, 1)
    with Prefetcher(coordinator, Counter().load, depth=1, first_step=1, rank=0) as batches:
        steps = batches.steps()
        _, first = next(steps)
        assert list(first) == [0]
        batches.take_wait_s()

        num_refused = coordinator.num_refused

        def go_on() -> None:
            wait_until(lambda: coordinator.num_refused >= num_refused + 20, "refusals of the second step")
            coordinator.paused = False

        waiting = threading.Thread(target=go_on)
        waiting.start()
        _, second = next(steps)
        assert list(second) == [1]
        waiting.join()
        paused_s = batches.take_paused_s()
        assert paused_s > 0.2, "the loop stood still"
        assert batches.take_wait_s() < paused_s / 2
        assert batches.take_paused_s() == 0.0


def test_paused_prefetcher_stops_at_once() -> None:
    with Prefetcher(PausedSteps(1, 1), Counter().load, depth=1, first_step=2, rank=0) as batches:
        thread = batches._thread
    wait_until(lambda: not thread.is_alive(), "the end of the thread")
