"""A target that shall end: it takes no new capture, and those that run come to their end."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from waiting import WAIT_S, wait_until

import trainer.demo
from services.contracts import CaptureJob
from services.errors import TargetBusyError, TargetUnavailableError
from services.target.actor import TargetServer
from services.target.client import TargetClient
from services.target.config import TargetConfig
from services.target.engine import TransformersEngine

TARGET = Path(trainer.demo.__file__).parent / "target"
JOB = CaptureJob(capture=1, prompt=0, epoch=0, input_ids=(5, 6, 7), loss_mask=(0, 1, 1), last_rows=(1,))


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[threading.Event, threading.Event]]:
    """Set when a forward pass has begun; holds it until it may end."""
    begun, may_end = threading.Event(), threading.Event()
    capture = TransformersEngine.capture

    def hold(engine: TransformersEngine, *args: object) -> object:
        begun.set()
        assert may_end.wait(WAIT_S)
        return capture(engine, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(TransformersEngine, "capture", hold)
    yield begun, may_end
    may_end.set()


def num_rows(client: TargetClient) -> int:
    stream = client.capture(JOB, layer_ids=(0,), wire_dtype="fp32", chunk_bytes=1024**2, timeout_s=WAIT_S)
    return sum(chunk.row_end - chunk.row_start for chunk, _ in stream if chunk.tensor == "context")


def test_draining_target_finishes_what_runs_and_takes_nothing_new(
    held: tuple[threading.Event, threading.Event],
) -> None:
    begun, may_end = held
    target = TargetServer(TargetConfig(model=str(TARGET), dtype="float32", num_gpus=0))
    address = target.address(WAIT_S)
    with TargetClient(address) as client, TargetClient(address) as late, ThreadPoolExecutor(2) as threads:
        running = threads.submit(num_rows, client)
        assert begun.wait(WAIT_S)
        target.turn_away()
        with pytest.raises(TargetBusyError, match="about to end: ask another target"):
            num_rows(late)
        late.describe(WAIT_S)
        drained = threads.submit(target.drain, WAIT_S)
        wait_until(lambda: is_refused(late), "the refusal of a new capture")
        assert not drained.done()
        assert not running.done()
        may_end.set()
        assert running.result(WAIT_S) == 3
        drained.result(WAIT_S)


def is_refused(client: TargetClient) -> bool:
    try:
        client.describe(WAIT_S)
    except TargetUnavailableError:
        return True
    return False


def test_target_that_still_loads_is_drained_at_once() -> None:
    target = object.__new__(TargetServer)
    target._server = None
    target.turn_away()
    target.drain(WAIT_S)
