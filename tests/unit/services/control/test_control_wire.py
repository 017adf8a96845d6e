from __future__ import annotations

import pytest

from services.contracts import Autoscaling, Event, TargetState
from services.control.records import (
    Action,
    AutoscaleAction,
    ContinueAction,
    EvaluationPoint,
    PauseAction,
    Reply,
    Request,
    RunStatus,
    ScaleAction,
    StatusAction,
    StopAction,
    recipe_name,
)
from services.control.wire import (
    WIRE_VERSION,
    pack_reply,
    pack_request,
    pack_status_reply,
    unpack_reply,
    unpack_request,
)
from services.errors import WireError
from services.wire import control_pb2 as wire

BARE = RunStatus(
    run_id="demo-1a2b3c", name="demo", output_dir="/out", attempt=1, target_model="t", algorithm="dspark",
    started_s=10.5, posted_s=11.25, host="h", pid=7,
)  # fmt: skip
FULL = BARE.model_copy(
    update={
        "state": "paused",
        "phase": "training",
        "step": 12,
        "total_steps": 100,
        "metrics": {"loss": 2.5, "accept_rate@0": 0.25},
        "learning_rate": 4e-3,
        "tokens_captured": 2**40,
        "tokens_trained": 5,
        "capture_tokens_per_s": 1.5,
        "train_tokens_per_s": 2.5,
        "trainer_wait_fraction": 0.0,
        "resident_bytes": 2**33,
        "peak_bytes": 2**34,
        "capacity_bytes": 2**35,
        "targets": (
            TargetState(index=0, state="serving", address="127.0.0.1:1"),
            TargetState(index=3, state="pending", message="waits for 1 fpga"),
        ),
        "num_targets_wanted": 2,
        "num_targets_most": 64,
        "autoscaling": Autoscaling(is_on=False, min=1, max=4),
        "evaluations": (EvaluationPoint(label="step_0", step=0, accepted_length=1.25, interval=(1.0, 1.5)),),
        "events": (Event(time_s=10.75, kind="scaling", message="targets scaled from 1 to 2"),),
    }
)


@pytest.mark.parametrize(
    "action",
    [
        StatusAction(),
        ScaleAction(targets=3),
        ScaleAction(targets=0),
        AutoscaleAction(is_on=True),
        AutoscaleAction(is_on=False),
        PauseAction(),
        ContinueAction(),
        StopAction(),
    ],
)
def test_request_comes_back_as_it_was(action: Action) -> None:
    request = Request(request_id="r1", action=action)
    assert unpack_request(pack_request(request)) == request


@pytest.mark.parametrize(
    "reply",
    [
        Reply(request_id="r1", is_done=True, message=""),
        Reply(request_id="r1", is_done=True, message="the run continues"),
        Reply(request_id="r1", is_done=False, message="too many", is_wrong_usage=True),
        Reply(request_id="r1", is_done=False, message=""),
    ],
)
def test_reply_comes_back_as_it_was(reply: Reply) -> None:
    assert unpack_reply(pack_reply(reply)) == reply


@pytest.mark.parametrize("status", [BARE, FULL])
def test_status_comes_back_as_it_was(status: RunStatus) -> None:
    assert unpack_reply(pack_status_reply("r1", status)) == status


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"\xff\xff", "no control request"),
        (wire.Request(wire_version=WIRE_VERSION + 1, request_id="r").SerializeToString(), "wire_version 2 came"),
        (wire.Request(wire_version=WIRE_VERSION, request_id="r").SerializeToString(), "needs a request_id and"),
        (wire.Request(wire_version=WIRE_VERSION, pause=wire.Pause()).SerializeToString(), "needs a request_id"),
    ],
)
def test_what_is_no_request_is_refused(data: bytes, says: str) -> None:
    with pytest.raises(WireError, match=says):
        unpack_request(data)


def test_reply_of_another_version_or_without_a_result_is_refused() -> None:
    with pytest.raises(WireError, match="the same version of Slipstream"):
        unpack_reply(wire.Reply(wire_version=WIRE_VERSION + 1, done=wire.Done()).SerializeToString())
    with pytest.raises(WireError, match="says nothing"):
        unpack_reply(wire.Reply(wire_version=WIRE_VERSION).SerializeToString())


def test_recipe_name_may_hold_dashes() -> None:
    assert recipe_name("my-own-run-1a2b3c") == "my-own-run"
