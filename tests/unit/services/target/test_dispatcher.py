"""The dispatcher with a compute function that the test holds back and lets go."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError

import pytest

from services.errors import FeatureError, TargetError, TargetUnavailableError
from services.target.dispatcher import Dispatcher
from services.target.request import CaptureInputs

WAIT_S = 120.0


def _inputs(num_tokens: int, layer: int = 0) -> CaptureInputs:
    return CaptureInputs(input_ids=(1,) * num_tokens, layer_ids=(layer,), last_rows=(), dtype="fp32")


class Gate:
    """Computes lengths; a pass begins only when the test opens the gate."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.entered = threading.Semaphore(0)
        self.open = threading.Semaphore(0)
        self.error: Exception | None = None

    def __call__(self, batch: list[CaptureInputs]) -> list[int]:
        self.batches.append([inputs.num_tokens for inputs in batch])
        self.entered.release()
        assert self.open.acquire(timeout=WAIT_S)
        if self.error is not None:
            raise self.error
        return [inputs.num_tokens for inputs in batch]


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
def dispatcher(gate: Gate) -> Iterator[Dispatcher[int]]:
    dispatcher = Dispatcher(gate, max_batch_tokens=20, max_batch_samples=4, batch_wait_s=0.0)
    yield dispatcher
    gate.open.release(100)
    dispatcher.close()


def test_requests_that_wait_during_a_pass_share_the_next(gate: Gate, dispatcher: Dispatcher[int]) -> None:
    first = dispatcher.submit(_inputs(3))
    assert gate.entered.acquire(timeout=WAIT_S)
    others = [dispatcher.submit(_inputs(length)) for length in (5, 6, 7)]
    gate.open.release(3)
    assert first.future.result(WAIT_S) == 3
    assert [ticket.future.result(WAIT_S) for ticket in others] == [5, 6, 7]
    assert gate.batches == [[3], [5, 6], [7]]  # 3 × 7 = 21 exceeds the budget of 20


def test_layer_ids_do_not_mix(gate: Gate, dispatcher: Dispatcher[int]) -> None:
    gate.open.release(3)
    tickets = [dispatcher.submit(_inputs(4, layer)) for layer in (0, 1)]
    assert [ticket.future.result(WAIT_S) for ticket in tickets] == [4, 4]
    assert gate.batches == [[4], [4]]


def test_batch_wait_lets_others_join(gate: Gate) -> None:
    dispatcher = Dispatcher(gate, max_batch_tokens=100, max_batch_samples=2, batch_wait_s=WAIT_S)
    gate.open.release(1)
    tickets = [dispatcher.submit(_inputs(length)) for length in (4, 5)]  # the second fills the batch: no wait left
    assert [ticket.future.result(WAIT_S / 2) for ticket in tickets] == [4, 5]
    assert gate.batches == [[4, 5]]
    dispatcher.close()


def test_cancel_drops_a_queued_request(gate: Gate, dispatcher: Dispatcher[int]) -> None:
    first = dispatcher.submit(_inputs(3))
    assert gate.entered.acquire(timeout=WAIT_S)
    dropped = dispatcher.submit(_inputs(5))
    assert dispatcher.num_waiting == 1
    dispatcher.cancel(dropped)
    assert dispatcher.num_waiting == 0
    with pytest.raises(CancelledError):
        dropped.future.result(WAIT_S)
    gate.open.release(2)
    assert first.future.result(WAIT_S) == 3
    assert dispatcher.submit(_inputs(6)).future.result(WAIT_S) == 6
    assert gate.batches == [[3], [6]]


def test_cancel_of_a_running_request_wakes_its_caller(gate: Gate, dispatcher: Dispatcher[int]) -> None:
    running = dispatcher.submit(_inputs(3))
    assert gate.entered.acquire(timeout=WAIT_S)
    dispatcher.cancel(running)
    with pytest.raises(CancelledError):
        running.future.result(WAIT_S)
    gate.open.release(2)
    assert dispatcher.submit(_inputs(4)).future.result(WAIT_S) == 4  # the thread survived


def test_an_error_reaches_every_caller_of_the_pass_and_no_other(gate: Gate, dispatcher: Dispatcher[int]) -> None:
    gate.error = FeatureError("not finite")
    failing = dispatcher.submit(_inputs(3))
    gate.open.release(1)
    with pytest.raises(FeatureError, match="not finite"):
        failing.future.result(WAIT_S)
    gate.error = None
    gate.open.release(1)
    assert dispatcher.submit(_inputs(4)).future.result(WAIT_S) == 4


def test_a_defect_is_reported_as_a_target_error(gate: Gate, dispatcher: Dispatcher[int]) -> None:
    gate.error = ZeroDivisionError("oops")
    failing = dispatcher.submit(_inputs(3))
    gate.open.release(1)
    with pytest.raises(TargetError, match=r"forward pass over 1 samples of \[3\] tokens failed: ZeroDivisionError"):
        failing.future.result(WAIT_S)


def test_close_refuses_what_is_queued_and_what_comes(gate: Gate) -> None:
    dispatcher = Dispatcher(gate, max_batch_tokens=20, max_batch_samples=1, batch_wait_s=0.0)
    running = dispatcher.submit(_inputs(3))
    assert gate.entered.acquire(timeout=WAIT_S)
    queued = dispatcher.submit(_inputs(4))
    closer = threading.Thread(target=dispatcher.close)
    closer.start()
    with pytest.raises(TargetUnavailableError, match="stopping"):
        queued.future.result(WAIT_S)
    gate.open.release(1)
    assert running.future.result(WAIT_S) == 3
    closer.join(WAIT_S)
    with pytest.raises(TargetUnavailableError, match="stopping"):
        dispatcher.submit(_inputs(5))


def test_a_pass_that_gives_too_few_results_fails_and_the_thread_survives() -> None:
    answers = iter([[], [7]])
    dispatcher: Dispatcher[int] = Dispatcher(
        lambda batch: next(answers), max_batch_tokens=20, max_batch_samples=1, batch_wait_s=0.0
    )
    with pytest.raises(TargetError, match="failed: ValueError"):
        dispatcher.submit(_inputs(3)).future.result(WAIT_S)
    assert dispatcher.submit(_inputs(3)).future.result(WAIT_S) == 7
    dispatcher.close()
