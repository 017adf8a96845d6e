"""How the command line and the dashboard reach a running job."""

from __future__ import annotations

import os
import time
import uuid
from pathlib import Path
from typing import Any

from services.contracts import Record
from services.control.attach import NoAnswerError, attach_ray
from services.control.records import (
    ACTOR_PREFIX,
    NAMESPACE,
    Action,
    AutoscaleAction,
    ContinueAction,
    PauseAction,
    Reply,
    Request,
    RunStatus,
    ScaleAction,
    StatusAction,
    StopAction,
    actor_name,
    recipe_name,
)
from services.control.wire import pack_request, unpack_reply
from services.errors import DeadlineError, SlipstreamError, UsageError
from services.reading import first_fault, read_json

STATUS_TIMEOUT_S = 60.0
"""A desk answers at once; this is for a machine that is busy."""

REPLY_TIMEOUT_S = 60.0
"""How long the driver may take to carry out a request."""

BEACON = "control.json"
"""File in a run's output directory that says where its desk is, while the run lives."""


class UnknownRunError(UsageError):
    """No run of that name is on the cluster, or several are."""

    status = "NOT_FOUND"


class RefusedError(SlipstreamError):
    """The run cannot do now what it was asked for."""

    status = "FAILED_PRECONDITION"


class RunEndedError(SlipstreamError):
    """The run ended before it answered."""

    status = "UNAVAILABLE"


class Beacon(Record):
    """What `BEACON` holds."""

    run_id: str
    ray_address: str
    pid: int
    has_token: bool
    """Whether the cluster wants a token."""


def running_runs(*, address: str | None = None) -> list[str]:
    """Ids of the runs on the cluster, sorted.

    Raises:
        ClusterError: There is no cluster, or it does not let this process in.
    """
    attach_ray(address)
    import ray

    named = ray.util.list_named_actors(all_namespaces=True)
    return sorted(
        actor["name"].removeprefix(ACTOR_PREFIX)
        for actor in named
        if actor["namespace"] == NAMESPACE and actor["name"].startswith(ACTOR_PREFIX)
    )


def attach(run: str | None = None, *, address: str | None = None) -> RunControl:
    """Find a running job.

    Args:
        run: Its id, its recipe's name where only one run has it, or its output directory; None takes the only one.
        address: host:port of its Ray cluster; None takes the one that the output directory names, RAY_ADDRESS, or the
            cluster of this machine.

    Raises:
        UnknownRunError: There is no such run, or more than one; lists those that run.
        ClusterError: There is no cluster, or it does not let this process in.
    """
    if run is not None and address is None and (beacon := read_beacon(Path(run))) is not None:
        return _follow(beacon)
    return RunControl(choose_run(run, running_runs(address=address)))


def _follow(beacon: Beacon) -> RunControl:
    if beacon.has_token:
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    try:
        return RunControl(choose_run(beacon.run_id, running_runs(address=beacon.ray_address)))
    except NoAnswerError as error:  # a driver that was killed could not take its beacon away
        raise UnknownRunError(f"run {beacon.run_id} does not run any more: {error}") from error


def choose_run(wanted: str | None, running: list[str]) -> str:
    """The id of the run that is meant.

    Raises:
        UnknownRunError: None, or more than one.
    """
    listed = f"running are: {', '.join(running)}" if running else "no run is on this cluster"
    if wanted is None:
        matching = running
    elif wanted in running:
        matching = [wanted]
    else:
        matching = [run_id for run_id in running if recipe_name(run_id) == wanted]
    if not matching:
        raise UnknownRunError(f"there is no run {wanted!r} here; {listed}" if wanted else listed)
    if len(matching) > 1:
        which = f"{wanted!r} is the name of {len(matching)} runs" if wanted else f"{len(matching)} runs are here"
        raise UnknownRunError(f"{which}: name one by its id; {listed}")
    return matching[0]


def read_beacon(output_dir: Path) -> Beacon | None:
    """Where the desk of the run in a directory is; None if no run lives there."""
    path = output_dir / BEACON
    if not path.is_file():
        return None
    try:
        return Beacon.model_validate(read_json(path.read_bytes()))
    except ValueError as error:
        raise UsageError(f"{path} is no record of a running job: {first_fault(error)}") from error


class RunControl:
    """One running job. Every request has an id; the same id again is not carried out again.

    Attributes:
        run_id: The run.
    """

    def __init__(self, run_id: str) -> None:
        """Attach to the run's desk; this process is attached to its cluster.

        Raises:
            UnknownRunError: The run has ended.
        """
        import ray

        self.run_id = run_id
        try:
            self._desk: Any = ray.get_actor(actor_name(run_id), namespace=NAMESPACE)
        except ValueError as error:
            raise UnknownRunError(f"run {run_id} is not on this cluster any more") from error

    def status(self) -> RunStatus:
        """How the run is.

        Raises:
            RunEndedError: It has ended.
            DeadlineError: Its desk does not answer.
        """
        answer = self._ask(StatusAction(), None, STATUS_TIMEOUT_S)
        assert isinstance(answer, RunStatus)
        return answer

    def scale(self, targets: int, *, request_id: str | None = None) -> Reply:
        """Have this many target servers; returns when the driver has begun to.

        Raises:
            UsageError: The number is out of bounds.
            RefusedError: The run cannot do that now.
            RunEndedError: It has ended.
            DeadlineError: Its driver does not answer.
        """
        if not 0 <= targets < 2**32:  # what the message can hold; the run knows its own bounds
            raise UsageError(f"targets={targets} is no number of targets; `slipstream status` shows the run's bound")
        return self._order(ScaleAction(targets=targets), request_id)

    def autoscale(self, is_on: bool, *, request_id: str | None = None) -> Reply:
        """Let the run scale its targets by itself again, or no more; raises as `scale`."""
        return self._order(AutoscaleAction(is_on=is_on), request_id)

    def pause(self, *, request_id: str | None = None) -> Reply:
        """Grant no further optimizer step; raises as `scale`."""
        return self._order(PauseAction(), request_id)

    def continue_(self, *, request_id: str | None = None) -> Reply:
        """Go on after a pause; raises as `scale`."""
        return self._order(ContinueAction(), request_id)

    def stop(self, *, request_id: str | None = None) -> Reply:
        """End the run in order, with a checkpoint; returns when the driver has begun to. Raises as `scale`."""
        try:
            return self._order(StopAction(), request_id)
        except RunEndedError:
            return Reply(request_id=request_id or "", is_done=True, message="the run has ended")

    def _order(self, action: Action, request_id: str | None) -> Reply:
        answer = self._ask(action, request_id, REPLY_TIMEOUT_S)
        assert isinstance(answer, Reply)
        if not answer.is_done:
            raise UsageError(answer.message) if answer.is_wrong_usage else RefusedError(answer.message)
        return answer

    def _ask(self, action: Action, request_id: str | None, timeout_s: float) -> Reply | RunStatus:
        import ray
        import ray.exceptions

        request = Request(request_id=request_id or uuid.uuid4().hex, action=action)
        data = pack_request(request)
        deadline_s = time.monotonic() + timeout_s
        while True:
            left_s = deadline_s - time.monotonic()
            try:
                answer: bytes | None = ray.get(self._desk.call.remote(data), timeout=max(0.0, left_s))
            except ray.exceptions.GetTimeoutError as error:
                raise self._too_late(request, timeout_s) from error
            except ray.exceptions.RayTaskError as error:
                if isinstance(error.cause, SlipstreamError):
                    raise error.cause from None
                raise
            except ray.exceptions.ActorUnavailableError as error:
                if left_s <= 0:
                    raise self._too_late(request, timeout_s) from error
                time.sleep(min(1.0, left_s))  # Ray restarts the desk
            except ray.exceptions.RayActorError as error:
                raise RunEndedError(f"run {self.run_id} has ended") from error
            else:
                if answer is not None:
                    return unpack_reply(answer)
                if left_s <= 0:
                    raise self._too_late(request, timeout_s)

    def _too_late(self, request: Request, timeout_s: float) -> DeadlineError:
        return DeadlineError(
            f"run {self.run_id} has not answered within {timeout_s:g} s: its driver is busy or hangs. The request "
            f"stays with it; the same again under request id {request.request_id} waits on and does nothing twice"
        )
