"""Runs and those who steer them, over a real Ray: two runs on one cluster, each with a desk of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray
from waiting import WAIT_S, wait_until

from services.contracts import Event
from services.control import client as client_module
from services.control.board import StatusBoard
from services.control.client import (
    BEACON,
    RefusedError,
    RunControl,
    RunEndedError,
    UnknownRunError,
    attach,
    read_beacon,
    running_runs,
)
from services.control.records import NAMESPACE, RunStatus, actor_name
from services.errors import OutputDirError, StoppedError, UsageError
from trainer import steering as steering_module
from trainer.steering import Steering

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A desk's process starts when it is asked for the first time."""
    for name in ("STATUS_TIMEOUT_S", "REPLY_TIMEOUT_S"):
        monkeypatch.setattr(client_module, name, WAIT_S)
    monkeypatch.setattr(steering_module, "ANSWER_TIMEOUT_S", WAIT_S)


class Run:
    """A driver without a job: it looks at its desk in a thread and notes what it is told."""

    def __init__(self, run_id: str, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self.folder = folder
        self.told: list[str] = []
        self.events: list[Event] = []
        self.stopped = threading.Event()
        status = RunStatus(
            run_id=run_id, name=run_id.rpartition("-")[0], output_dir=str(folder), attempt=1, target_model="t",
            algorithm="dspark", started_s=0.0, posted_s=0.0, host="h", pid=1, num_targets_wanted=1, num_targets_most=4,
        )  # fmt: skip
        self.board = StatusBoard(status)
        self.steering = Steering(self.board, self, self.events.append)
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def open(self) -> None:
        self.steering.open()
        self.steering.enter("training")
        self._thread.start()

    def _watch(self) -> None:
        while not self._ending.wait(0.02):
            try:
                self.steering.look()
            except StoppedError:
                self.stopped.set()

    def close(self) -> None:
        self._ending.set()
        if self._thread.is_alive():
            self._thread.join()
        self.steering.close()

    def scale(self, targets: int) -> None:
        if not 1 <= targets <= 4:
            raise UsageError(f"targets={targets} must lie between 1 and 4")
        self.told.append(f"scale {targets}")

    def pause(self) -> int:
        self.told.append("pause")
        return self.board.status.step

    def continue_(self) -> None:
        self.told.append("continue")


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[str], Run]]:
    """Start a run under an id; all of them end with the test."""
    runs: list[Run] = []

    def start(run_id: str) -> Run:
        runs.append(Run(run_id, tmp_path / run_id))
        runs[-1].open()
        return runs[-1]

    yield start
    for run in runs:
        run.close()


def test_two_runs_on_one_cluster_do_not_cross(start: Callable[[str], Run]) -> None:
    first, second = start("demo-aaaaaa"), start("demo-bbbbbb")
    assert running_runs() == ["demo-aaaaaa", "demo-bbbbbb"]
    assert attach("demo-aaaaaa").scale(3).message == "targets scaled from 1 to 3"
    assert attach("demo-bbbbbb").pause().is_done
    assert (first.told, second.told) == (["scale 3"], ["pause"])
    wait_until(lambda: attach("demo-aaaaaa").status().num_targets_wanted == 3, "the status of the scaled run")
    wait_until(lambda: attach("demo-bbbbbb").status().state == "paused", "the status of the paused run")
    assert attach("demo-aaaaaa").status().state == "training"
    with pytest.raises(UnknownRunError, match=r"'demo' is the name of 2 runs: .*demo-aaaaaa, demo-bbbbbb"):
        attach("demo")
    second.close()
    wait_until(lambda: running_runs() == ["demo-aaaaaa"], "the end of the second run's desk")
    assert attach("demo").run_id == "demo-aaaaaa"
    with pytest.raises(UnknownRunError, match="no run 'demo-bbbbbb' here; running are: demo-aaaaaa"):
        attach("demo-bbbbbb")


def test_repeated_request_is_carried_out_once(start: Callable[[str], Run]) -> None:
    run = start("demo-cccccc")
    control = attach("demo-cccccc")
    replies = [control.scale(2, request_id="mine") for _ in range(3)]
    assert run.told == ["scale 2"]
    assert {reply.message for reply in replies} == {"targets scaled from 1 to 2"}
    with pytest.raises(UsageError, match="'mine' was used for another request"):
        control.scale(3, request_id="mine")
    with pytest.raises(UsageError, match="targets=9 must lie between 1 and 4"):
        control.scale(9)
    for targets in (-1, 2**32):
        with pytest.raises(UsageError, match=f"targets={targets} is no number of targets"):
            control.scale(targets)
    assert run.told == ["scale 2"]


def test_stop_reaches_the_driver_once_and_later_requests_are_refused(start: Callable[[str], Run]) -> None:
    run = start("demo-dddddd")
    control = attach("demo-dddddd")
    assert "the same command again goes on" in control.stop().message
    wait_until(run.stopped.is_set, "the driver's StoppedError")
    assert control.stop().message == "the run stops already"
    with pytest.raises(RefusedError, match="it is stopping"):
        control.scale(2)
    wait_until(lambda: control.status().state == "stopping", "the posted state")


def test_output_directory_leads_to_its_run_while_it_lives(start: Callable[[str], Run]) -> None:
    run = start("demo-eeeeee")
    beacon = read_beacon(run.folder)
    assert beacon is not None
    assert beacon.run_id == "demo-eeeeee"
    assert attach(str(run.folder)).run_id == "demo-eeeeee"
    run.close()
    assert not (run.folder / BEACON).exists()


def test_second_driver_of_a_run_is_refused(start: Callable[[str], Run], monkeypatch: pytest.MonkeyPatch) -> None:
    start("demo-ffffff")
    monkeypatch.setattr(steering_module, "NAME_FREE_S", 0.0)
    with pytest.raises(OutputDirError, match=r"demo-ffffff is running on this cluster already.*--output-dir"):
        start("demo-ffffff")


def test_desk_that_died_comes_back_and_is_used_again(start: Callable[[str], Run]) -> None:
    run = start("demo-012345")
    control = attach("demo-012345")
    assert control.scale(2).is_done
    wait_until(lambda: control.status().num_targets_wanted == 2, "the posted number of targets")
    ray.kill(ray.get_actor(actor_name("demo-012345"), namespace=NAMESPACE), no_restart=False)
    assert control.scale(3).message == "targets scaled from 2 to 3"
    wait_until(lambda: control.status().num_targets_wanted == 3, "the posted number of targets")
    assert run.told == ["scale 2", "scale 3"], "a request that the dead desk had handed on is not carried out again"


def has_ended(control: RunControl) -> bool:
    try:
        control.status()
    except RunEndedError:
        return True
    return False


def test_run_that_ends_while_it_is_asked_says_so(start: Callable[[str], Run], tmp_path: Path) -> None:
    run = start("demo-abcdef")
    control = attach("demo-abcdef")
    ray.kill(ray.get_actor(actor_name("demo-abcdef"), namespace=NAMESPACE))
    wait_until(lambda: has_ended(control), "the death of the desk")
    with pytest.raises(RunEndedError, match="run demo-abcdef has ended"):
        control.status()
    assert control.stop().message == "the run has ended"
    wait_until(lambda: [event.kind for event in run.events] == ["control"], "the driver noticing that its desk is gone")
    with pytest.raises(UnknownRunError, match="not on this cluster any more"):
        RunControl("demo-abcdef")
