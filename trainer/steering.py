"""The driver's side of control: takes requests from the run's desk, carries them out, and says how the run is.

Nothing here has a thread: the driver calls `look` wherever it waits, so a request is carried out between two looks at
the run, never in the middle of one.
"""

from __future__ import annotations

import os
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import ray
import ray.exceptions

from services.contracts import Event
from services.control.board import StatusBoard
from services.control.client import BEACON, Beacon
from services.control.desk import Desk
from services.control.records import (
    NAMESPACE,
    Action,
    AutoscaleAction,
    ContinueAction,
    PauseAction,
    Reply,
    Request,
    RunStateName,
    ScaleAction,
    StopAction,
    actor_name,
)
from services.control.requests import MOST_REPLIES
from services.control.wire import pack_reply, pack_status_reply, unpack_request
from services.errors import OutputDirError, SlipstreamError, StoppedError, UsageError
from services.files import replace_text

POST_S = 1.0
"""How often the desk hears how the run is."""

TAKE_WAIT_S = 10.0
"""How long one call for requests stays with the desk."""

NAME_FREE_S = 90.0
"""Ray may need so long to notice that the driver of the attempt before has died."""

ANSWER_TIMEOUT_S = 5.0

POLL_S = 0.5


class Steered(Protocol):
    """What a job lets others do with it."""

    def scale(self, targets: int) -> str:
        """Have this many targets; returns what else that means. Raises `UsageError` if that is out of bounds."""
        ...

    def autoscale(self, is_on: bool) -> str:
        """Scale targets by itself, or no more; returns what that means. Raises `UsageError` if the run cannot."""
        ...

    def pause(self) -> int:
        """Grant no further step; returns the last one that is granted."""
        ...

    def continue_(self) -> None:
        """Grant steps again."""
        ...


class Steering:
    """One run's desk, seen from its driver.

    Args:
        board: Keeps the status that the desk hands out; a sink of the run's journal.
        job: Carries requests out.
        report: Takes events.
    """

    def __init__(self, board: StatusBoard, job: Steered, report: Callable[[Event], None]) -> None:
        self._board = board
        self._job = job
        self._report = report
        self._desk: Any = None
        self._inbox: Any = None
        self._beacon: Path | None = None
        self._last_step: int | None = None
        """The last step before the pause; None while the run is not paused."""
        self._stop_requested = False
        self._replies: OrderedDict[str, Reply] = OrderedDict()
        """Newest replies by request id: a desk that died has forgotten what it handed on."""
        self._next_post_s = 0.0

    def open(self) -> None:
        """Start the desk; the process is attached to Ray.

        Raises:
            OutputDirError: The run has a desk on this cluster already: another driver runs it.
        """
        status = self._board.status
        self._desk = _start_desk(status.run_id, pack_status_reply("", status))
        self._beacon = Path(status.output_dir) / BEACON
        beacon = Beacon(
            run_id=status.run_id,
            ray_address=ray.get_runtime_context().gcs_address,
            pid=status.pid,
            has_token=_uses_token(),
        )
        replace_text(self._beacon, beacon.model_dump_json() + "\n")

    def enter(self, state: RunStateName) -> None:
        """The run has come this far."""
        self._last_step = None
        self._board.set(state=state)
        self._next_post_s = 0.0

    def look(self) -> None:
        """Carry out what was asked for since the last call, and post the run's status once a second.

        Raises:
            StoppedError: The run is asked to stop, once.
        """
        if self._desk is None:
            return
        for request in self._take():
            self._answer(self._carry_out(request))
        if self._board.status.state == "pausing" and self._board.status.step >= (self._last_step or 0):
            self._board.set(state="paused")
            self._next_post_s = 0.0
        self._post()
        if self._stop_requested and self._board.status.state != "stopping":
            self.enter("stopping")
            self._post()
            raise StoppedError("the run was asked to stop (slipstream stop)")

    def close(self) -> None:
        """End the desk. Again: nothing happens."""
        desk, self._desk = self._desk, None
        if self._beacon is not None:
            self._beacon.unlink(missing_ok=True)
        if desk is not None:
            ray.kill(desk)

    def _take(self) -> list[Request]:
        if self._inbox is None:
            self._inbox = self._desk.take.remote(TAKE_WAIT_S)
        ready, _ = ray.wait([self._inbox], timeout=0)
        if not ready:
            return []
        inbox, self._inbox = self._inbox, None
        try:
            requests: list[bytes] = ray.get(inbox)
        except ray.exceptions.ActorDiedError as error:
            self._desk = None
            message = f"the run can be steered no more, its desk is gone: {error}"
            self._report(Event(time_s=time.time(), kind="control", message=message))
            return []
        except ray.exceptions.RayActorError:
            return []  # Ray restarts it
        return [unpack_request(request) for request in requests]

    def _carry_out(self, request: Request) -> Reply:
        request_id = request.request_id
        if request_id not in self._replies:
            try:
                reply = Reply(request_id=request_id, is_done=True, message=self._do(request.action))
            except SlipstreamError as error:
                wrong = isinstance(error, UsageError)
                reply = Reply(request_id=request_id, is_done=False, message=str(error), is_wrong_usage=wrong)
            self._replies[request_id] = reply
            if len(self._replies) > MOST_REPLIES:
                self._replies.popitem(last=False)
        return self._replies[request_id]

    def _do(self, action: Action) -> str:
        """Do what is asked; returns what that means, in words."""
        state = self._board.status.state
        if isinstance(action, StopAction):
            return self._stop()
        if state in ("stopping", "measuring"):
            raise SlipstreamError(f"the run trains no more, it is {state}")
        match action:
            case ScaleAction(targets=targets):
                before = self._board.status.num_targets_wanted
                note = self._job.scale(targets)
                self._board.set(num_targets_wanted=targets)
                return f"targets scaled from {before} to {targets}" + (f"; {note}" if note else "")
            case AutoscaleAction(is_on=is_on):
                return self._job.autoscale(is_on)
            case PauseAction():
                return self._pause()
            case ContinueAction():
                return self._continue()
        raise AssertionError(f"{action!r} is answered by the desk")

    def _pause(self) -> str:
        if self._last_step is not None:
            return f"the run pauses already, after step {self._last_step}"
        if self._board.status.state != "training":
            raise SlipstreamError("the run is still starting: it can be paused once it trains")
        self._last_step = self._job.pause()
        self._board.set(state="pausing")
        self._say("pause", f"paused after step {self._last_step}: no further step begins until the run continues")
        return f"the run pauses after step {self._last_step}; `slipstream continue` lets it go on"

    def _continue(self) -> str:
        if self._last_step is None:
            return "the run is not paused"
        self._job.continue_()
        self.enter("training")
        self._say("continue", "the run continues")
        return "the run continues"

    def _stop(self) -> str:
        if self._board.status.state == "stopping":
            return "the run stops already"
        self._stop_requested = True
        self._say("stop", "asked to stop")
        if self._board.status.state == "starting":
            return "the run stops before it trains; the same command again starts it"
        if self._board.status.state == "measuring":
            return "the run stops; it has trained, and the same command again measures its drafter"
        return "the run stops after its step and writes a checkpoint; the same command again goes on from there"

    def _say(self, kind: str, message: str) -> None:
        self._report(Event(time_s=time.time(), kind=kind, message=message))

    def _answer(self, reply: Reply) -> None:
        try:
            ray.get(self._desk.answer.remote(reply.request_id, pack_reply(reply)), timeout=ANSWER_TIMEOUT_S)
        except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError) as error:
            self._say("control", f"the reply to request {reply.request_id} did not reach the desk: {error}")

    def _post(self) -> None:
        now_s = time.monotonic()
        if self._desk is None or now_s < self._next_post_s:
            return
        self._next_post_s = now_s + POST_S
        self._board.set(posted_s=time.time())
        self._desk.post.remote(pack_status_reply("", self._board.status))


def _start_desk(run_id: str, status: bytes) -> Any:
    desk_class: Any = ray.remote(Desk)
    deadline_s = time.monotonic() + NAME_FREE_S
    while True:
        try:
            return desk_class.options(name=actor_name(run_id), namespace=NAMESPACE, num_cpus=0, max_restarts=-1).remote(
                status
            )
        except ValueError as error:  # the name is taken
            if time.monotonic() >= deadline_s:
                raise OutputDirError(
                    f"run {run_id} is running on this cluster already: another driver has its desk. Stop it with "
                    f"`slipstream stop {run_id}`, or choose another --output-dir"
                ) from error
            time.sleep(POLL_S)


def _uses_token() -> bool:
    return os.environ.get("RAY_AUTH_MODE", "").lower() == "token"
