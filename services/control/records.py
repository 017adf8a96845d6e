"""What is asked of a running job and what it answers: the records behind proto/control.proto."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from services.contracts import Autoscaling, Event, Record, TargetState

NAMESPACE = "slipstream"
"""Ray namespace of the desks of all runs."""

ACTOR_PREFIX = "slipstream-"
"""A desk's name is this and its run's id."""

RunStateName = Literal["starting", "training", "pausing", "paused", "stopping", "measuring"]


class StatusAction(Record):
    """Say how the run is."""


class ScaleAction(Record):
    """Have this many target servers."""

    targets: int


class AutoscaleAction(Record):
    """Let the run scale its targets by itself again, or no more."""

    is_on: bool


class PauseAction(Record):
    """Grant no further optimizer step."""


class ContinueAction(Record):
    """Go on after a pause."""


class StopAction(Record):
    """End the run in order, resumable."""


Action = StatusAction | ScaleAction | AutoscaleAction | PauseAction | ContinueAction | StopAction


class Request(Record):
    """One request; the same `request_id` again is the same request."""

    request_id: str
    action: Action


class Reply(Record):
    """What became of a request."""

    request_id: str
    is_done: bool
    """Whether it was carried out; otherwise it was refused and nothing has changed."""
    message: str
    is_wrong_usage: bool = False
    """Refused because the request itself is wrong, and not only untimely."""


class EvaluationPoint(Record):
    """Decoded τ of a checkpoint."""

    label: str
    step: int
    accepted_length: float
    interval: tuple[float, float]


class RunStatus(Record):
    """A run as its driver saw it about a second ago at most."""

    run_id: str
    name: str
    output_dir: str
    attempt: int
    target_model: str
    algorithm: str
    state: RunStateName = "starting"
    phase: str = ""
    """What the run does, in words."""
    step: int = 0
    total_steps: int = 0
    """0 while it is not known."""
    metrics: dict[str, float] = Field(default_factory=dict)
    """Running means of the training metrics."""
    learning_rate: float = 0.0
    tokens_captured: int = 0
    tokens_trained: int = 0
    capture_tokens_per_s: float = 0.0
    train_tokens_per_s: float = 0.0
    trainer_wait_fraction: float | None = None
    resident_bytes: int = 0
    peak_bytes: int = 0
    capacity_bytes: int = 0
    targets: tuple[TargetState, ...] = ()
    num_targets_wanted: int = 0
    num_targets_most: int = 0
    """Bound of `scale`."""
    autoscaling: Autoscaling | None = None
    """None if the recipe leaves the number of targets to people."""
    evaluations: tuple[EvaluationPoint, ...] = ()
    events: tuple[Event, ...] = ()
    """The newest ones, oldest first."""
    started_s: float
    """Wall clock at which the attempt began."""
    posted_s: float
    """Wall clock at which the driver said this."""
    host: str
    pid: int


def actor_name(run_id: str) -> str:
    """Name of the desk of a run."""
    return f"{ACTOR_PREFIX}{run_id}"


def recipe_name(run_id: str) -> str:
    """The recipe's name in a run's id, `<name>-<six hex digits>`."""
    return run_id.rpartition("-")[0]
