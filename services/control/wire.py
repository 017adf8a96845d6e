"""Records of control to and from the messages of proto/control.proto."""

from __future__ import annotations

from typing import Any, Final

from google.protobuf.message import DecodeError

from services.contracts import Autoscaling, Event, TargetState
from services.control.records import (
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
)
from services.errors import WireError
from services.wire import control_pb2 as wire

WIRE_VERSION: Final = 1
"""Version of proto/control.proto; driver and client must have the same."""

_PLAIN: Final[dict[str, type[StatusAction | PauseAction | ContinueAction | StopAction]]] = {
    "status": StatusAction,
    "pause": PauseAction,
    "continue_run": ContinueAction,
    "stop": StopAction,
}
"""Actions that are only a name."""

_SCALARS: Final = tuple(
    name
    for name in RunStatus.model_fields
    if name not in ("metrics", "targets", "evaluations", "events", "autoscaling")
)


def pack_request(request: Request) -> bytes:
    """A request as it travels."""
    message = wire.Request(wire_version=WIRE_VERSION, request_id=request.request_id)
    if isinstance(request.action, ScaleAction):
        message.scale.targets = request.action.targets
        message.scale.SetInParent()
    elif isinstance(request.action, AutoscaleAction):
        message.autoscale.on = request.action.is_on
        message.autoscale.SetInParent()
    else:
        (field,) = (name for name, action in _PLAIN.items() if isinstance(request.action, action))
        getattr(message, field).SetInParent()
    return message.SerializeToString()


def unpack_request(data: bytes) -> Request:
    """The request in a message.

    Raises:
        WireError: It is none, or of another version.
    """
    message = wire.Request()
    _parse(message, data, "request")
    field = message.WhichOneof("action")
    if field is None or not message.request_id:
        raise WireError("a control request needs a request_id and an action")
    if field == "scale":
        return Request(request_id=message.request_id, action=ScaleAction(targets=message.scale.targets))
    if field == "autoscale":
        return Request(request_id=message.request_id, action=AutoscaleAction(is_on=message.autoscale.on))
    return Request(request_id=message.request_id, action=_PLAIN[field]())


def pack_reply(reply: Reply) -> bytes:
    """A reply as it travels."""
    message = wire.Reply(wire_version=WIRE_VERSION, request_id=reply.request_id)
    if reply.is_done:
        message.done.message = reply.message
        message.done.SetInParent()
    else:
        message.refusal.message = reply.message
        message.refusal.is_wrong_usage = reply.is_wrong_usage
        message.refusal.SetInParent()
    return message.SerializeToString()


def pack_status_reply(request_id: str, status: RunStatus) -> bytes:
    """The reply to a status request as it travels."""
    body = wire.RunStatus(
        metrics=status.metrics,
        targets=[
            wire.TargetState(
                index=target.index, state=target.state, address=target.address or "", message=target.message
            )
            for target in status.targets
        ],
        evaluations=[
            wire.Evaluation(
                label=point.label,
                step=point.step,
                accepted_length=point.accepted_length,
                interval_low=point.interval[0],
                interval_high=point.interval[1],
            )
            for point in status.evaluations
        ],
        events=[wire.Event(**event.model_dump()) for event in status.events],
        autoscaling=wire.Autoscaling(**status.autoscaling.model_dump()) if status.autoscaling else None,
        **{name: value for name in _SCALARS if (value := getattr(status, name)) is not None},
    )
    message = wire.Reply(wire_version=WIRE_VERSION, request_id=request_id, status=body)
    return message.SerializeToString()


def unpack_reply(data: bytes) -> Reply | RunStatus:
    """The reply in a message.

    Raises:
        WireError: It is none, or of another version.
    """
    message = wire.Reply()
    _parse(message, data, "reply")
    match message.WhichOneof("result"):
        case "done":
            return Reply(request_id=message.request_id, is_done=True, message=message.done.message)
        case "refusal":
            refusal = message.refusal
            return Reply(
                request_id=message.request_id,
                is_done=False,
                message=refusal.message,
                is_wrong_usage=refusal.is_wrong_usage,
            )
        case "status":
            return _status(message.status)
        case _:
            raise WireError("a control reply says nothing")


def _status(body: wire.RunStatus) -> RunStatus:
    scalars: dict[str, Any] = {name: getattr(body, name) for name in _SCALARS}
    if not body.HasField("trainer_wait_fraction"):
        scalars["trainer_wait_fraction"] = None
    own = body.autoscaling if body.HasField("autoscaling") else None
    return RunStatus(
        metrics=dict(body.metrics),
        targets=tuple(
            TargetState.model_validate(
                {
                    "index": target.index,
                    "state": target.state,
                    "address": target.address or None,
                    "message": target.message,
                }
            )
            for target in body.targets
        ),
        evaluations=tuple(
            EvaluationPoint(
                label=point.label,
                step=point.step,
                accepted_length=point.accepted_length,
                interval=(point.interval_low, point.interval_high),
            )
            for point in body.evaluations
        ),
        autoscaling=Autoscaling(is_on=own.is_on, min=own.min, max=own.max) if own is not None else None,
        events=tuple(Event(time_s=event.time_s, kind=event.kind, message=event.message) for event in body.events),
        **scalars,
    )


def _parse(message: wire.Request | wire.Reply, data: bytes, what: str) -> None:
    try:
        message.ParseFromString(data)
    except DecodeError as error:
        raise WireError(f"this is no control {what}: {error}") from error
    if message.wire_version != WIRE_VERSION:
        raise WireError(
            f"a control {what} of wire_version {message.wire_version} came, this Slipstream speaks {WIRE_VERSION}: use "
            "the same version of Slipstream here and in the run"
        )
