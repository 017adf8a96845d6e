"""What a driver answers to each request; the way of a request through Ray is in tests/e2e/test_steering_a_run.py."""

from __future__ import annotations

import pytest

from services.contracts import Event
from services.control.board import StatusBoard
from services.control.records import (
    Action,
    AutoscaleAction,
    ContinueAction,
    PauseAction,
    Reply,
    Request,
    RunStateName,
    RunStatus,
    ScaleAction,
    StopAction,
)
from services.errors import UsageError
from trainer.steering import Steering

GRANTED = 12


class Job:
    """Notes what it is told."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.note = ""

    def scale(self, targets: int) -> str:
        if targets > 4:
            raise UsageError(f"targets={targets} is too many")
        self.told.append(f"scale {targets}")
        return self.note

    def autoscale(self, is_on: bool) -> str:
        self.told.append(f"autoscale {is_on}")
        return "so it is"

    def pause(self) -> int:
        self.told.append("pause")
        return GRANTED

    def continue_(self) -> None:
        self.told.append("continue")


class Run:
    """A steering and what is around it."""

    def __init__(self, state: RunStateName) -> None:
        status = RunStatus(
            run_id="demo-1a2b3c", name="demo", output_dir="/out", attempt=1, target_model="t", algorithm="dspark",
            started_s=0.0, posted_s=0.0, host="h", pid=1, num_targets_wanted=1, num_targets_most=4,
        )  # fmt: skip
        self.job = Job()
        self.events: list[Event] = []
        self.board = StatusBoard(status)
        self.steering = Steering(self.board, self.job, self.events.append)
        self.steering.enter(state)
        self.num_asked = 0

    def ask(self, action: Action, request_id: str | None = None) -> Reply:
        self.num_asked += 1
        return self.steering._carry_out(Request(request_id=request_id or str(self.num_asked), action=action))


def test_scale_is_carried_out_and_shown() -> None:
    run = Run("training")
    assert run.ask(ScaleAction(targets=3), "a").message == "targets scaled from 1 to 3"
    assert run.job.told == ["scale 3"]
    assert run.board.status.num_targets_wanted == 3


def test_scale_says_what_else_it_means() -> None:
    run = Run("training")
    run.job.note = "autoscaling is suspended"
    assert run.ask(ScaleAction(targets=3)).message == "targets scaled from 1 to 3; autoscaling is suspended"


def test_autoscaling_is_switched() -> None:
    run = Run("training")
    assert run.ask(AutoscaleAction(is_on=True)).message == "so it is"
    assert run.ask(AutoscaleAction(is_on=False)).is_done
    assert run.job.told == ["autoscale True", "autoscale False"]


def test_request_that_a_new_desk_hands_on_again_is_answered_and_not_carried_out() -> None:
    run = Run("training")
    replies = [run.ask(ScaleAction(targets=3), "a") for _ in range(2)]
    assert replies[0] == replies[1] == Reply(request_id="a", is_done=True, message="targets scaled from 1 to 3")
    assert run.job.told == ["scale 3"]


def test_scale_out_of_bounds_is_wrong_usage_and_changes_nothing() -> None:
    run = Run("training")
    reply = run.ask(ScaleAction(targets=5))
    assert (reply.is_done, reply.is_wrong_usage, reply.message) == (False, True, "targets=5 is too many")
    assert run.board.status.num_targets_wanted == 1


def test_pause_and_continue_are_told_once() -> None:
    run = Run("training")
    assert "after step 12" in run.ask(PauseAction()).message
    assert run.board.status.state == "pausing"
    assert "already" in run.ask(PauseAction()).message
    assert run.ask(ContinueAction()).is_done
    assert run.board.status.state == "training"
    assert run.ask(ContinueAction()).message == "the run is not paused"
    assert run.job.told == ["pause", "continue"]
    assert [event.kind for event in run.events] == ["pause", "continue"]


@pytest.mark.parametrize("state", ["starting", "measuring", "stopping"])
def test_pause_is_untimely_where_nothing_trains(state: RunStateName) -> None:
    run = Run(state)
    reply = run.ask(PauseAction())
    assert (reply.is_done, reply.is_wrong_usage) == (False, False)
    assert run.job.told == []


def test_scale_is_possible_as_soon_as_the_targets_start() -> None:
    assert Run("starting").ask(ScaleAction(targets=2)).is_done
    assert not Run("measuring").ask(ScaleAction(targets=2)).is_done


@pytest.mark.parametrize("state", ["starting", "training", "paused", "measuring"])
def test_stop_is_possible_at_any_time(state: RunStateName) -> None:
    run = Run(state)
    assert run.ask(StopAction()).is_done
    assert [event.kind for event in run.events] == ["stop"]


def test_stop_again_is_answered_and_not_said_again() -> None:
    run = Run("stopping")
    assert run.ask(StopAction()).message == "the run stops already"
    assert run.events == []
