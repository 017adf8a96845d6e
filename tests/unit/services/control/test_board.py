from __future__ import annotations

from typing import Any

import pytest
from test_control_wire import BARE

from services.contracts import Autoscaling, Event, TargetState
from services.control.board import MOST_EVENTS, StatusBoard
from services.control.records import EvaluationPoint


def step(number: int, loss: float, **changes: Any) -> dict[str, Any]:
    record = {
        "kind": "step", "time_s": 1.0, "step": number, "total_steps": 9, "metrics": {"loss": loss},
        "learning_rate": 0.5, "samples": 4, "tokens": 100, "tokens_per_s": 50.0, "wait_s": 0.0, "step_s": 2.0,
        "wait_fraction": 0.125,
    }  # fmt: skip
    return record | changes


def test_steps_give_running_means_and_the_newest_figures() -> None:
    board = StatusBoard(BARE)
    for number, loss in enumerate((4.0, 2.0, 0.0), start=1):
        board.take(step(number, loss))
    status = board.status
    assert (status.step, status.total_steps, status.learning_rate) == (3, 9, 0.5)
    assert status.metrics == {"loss": pytest.approx(2.0)}, "the mean, while there are few"
    assert (status.train_tokens_per_s, status.trainer_wait_fraction) == (50.0, 0.125)


def test_figures_events_and_evaluations_are_taken_over() -> None:
    board = StatusBoard(BARE)
    target = TargetState(index=1, state="pending", message="waits for 1 fpga")
    board.take(
        {
            "kind": "figures", "time_s": 1.0, "phase": "training", "step": 0, "tokens_captured": 5, "tokens_trained": 3,
            "capture_tokens_per_s": 2.5, "resident_bytes": 10, "peak_bytes": 20, "capacity_bytes": 30,
            "targets": [target.model_dump(mode="json")], "autoscaling": {"is_on": True, "min": 1, "max": 4},
        }
    )  # fmt: skip
    board.take({"kind": "event", "time_s": 2.0, "event": "scaling", "message": "targets scaled from 1 to 2"})
    board.take(
        {
            "kind": "evaluation", "time_s": 3.0, "label": "step_0", "step": 0, "accepted_length": 1.5,
            "interval": [1.25, 1.75], "accept_rate": [0.5], "lossless": True,
        }
    )  # fmt: skip
    status = board.status
    assert (status.phase, status.tokens_captured, status.tokens_trained) == ("training", 5, 3)
    assert (status.resident_bytes, status.peak_bytes, status.capacity_bytes) == (10, 20, 30)
    assert status.targets == (target,)
    assert status.autoscaling == Autoscaling(is_on=True, min=1, max=4)
    assert status.events == (Event(time_s=2.0, kind="scaling", message="targets scaled from 1 to 2"),)
    assert status.evaluations == (
        EvaluationPoint(label="step_0", step=0, accepted_length=1.5, interval=(1.25, 1.75)),
    )  # fmt: skip


def test_only_the_newest_events_are_kept_and_other_records_say_nothing() -> None:
    board = StatusBoard(BARE)
    for number in range(MOST_EVENTS + 3):
        board.take({"kind": "event", "time_s": float(number), "event": "restart", "message": str(number)})
    assert [event.message for event in board.status.events] == [str(number) for number in range(3, MOST_EVENTS + 3)]
    before = board.status
    board.take({"kind": "run", "time_s": 1.0, "run_id": "other"})
    assert board.status == before
