"""Which records of a history can be read: the fields that the page needs, and what they may hold.

A file that a person, a full disk or another version has had its hands on must not end the page: a record that does not
fit is left out and counted.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from services.telemetry import RunOutcome

Step = Annotated[int, Field(ge=0, lt=2**53)]
Amount = Annotated[float, Field(ge=0, lt=1e300)]
Time = Annotated[float, Field(ge=0, lt=1e11)]
Loose = Annotated[float, Field(allow_inf_nan=True)]
"""A figure that may be no number: then its series has no point there."""


class _Shape(BaseModel):
    """Fields that are not named here are nobody's business."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="ignore")

    time_s: Time


class _Run(_Shape):
    run_id: str = ""
    name: str = ""
    attempt: Step = 1
    resumed_from_step: Step | None = None
    target: str = ""
    algorithm: str = ""
    block_size: Step | None = None
    reuse: Step = 1
    total_steps: Step | None = None
    command: str = ""
    host: str = ""
    pid: Annotated[int, Field(ge=1, lt=2**31)] | None = None


class _Step(_Shape):
    step: Step
    total_steps: Step
    metrics: dict[str, Loose]
    learning_rate: Loose
    tokens_per_s: Loose
    wait_s: Loose
    step_s: Loose


class _Target(BaseModel):
    model_config = ConfigDict(strict=True)

    index: Step
    state: str
    address: str | None = None
    message: str


class _Autoscaling(BaseModel):
    model_config = ConfigDict(strict=True)

    is_on: bool
    min: Step
    max: Step


class _Figures(_Shape):
    resident_bytes: Amount
    capacity_bytes: Amount
    capture_tokens_per_s: Amount
    step: Step = 0
    phase: str = ""
    tokens_captured: Amount | None = None
    tokens_trained: Amount | None = None
    peak_bytes: Amount | None = None
    targets: list[_Target] = []
    autoscaling: _Autoscaling | None = None


class _Event(_Shape):
    event: str
    message: str


class _Domain(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="ignore")

    num_samples: Step = 0
    accepted_length: Amount | None = None
    interval: list[Amount] | None = None


class _Evaluation(_Shape):
    step: Step
    num_samples: Step | None = None
    label: str = ""
    accepted_length: Amount
    interval: list[Amount] = []
    accept_rate: list[Amount] = []
    domains: dict[str, _Domain] = {}
    lossless: bool | None = None


class _End(_Shape):
    outcome: RunOutcome
    message: str


SHAPES: dict[str, type[_Shape]] = {
    "run": _Run,
    "step": _Step,
    "figures": _Figures,
    "event": _Event,
    "evaluation": _Evaluation,
    "end": _End,
}


def is_known(kind: Any) -> bool:
    """Whether the page reads records of this kind."""
    return isinstance(kind, str) and kind in SHAPES


def read_record(record: dict[str, Any]) -> dict[str, Any] | None:
    """What of a record of a known kind the page reads; None if it cannot be read."""
    kind = record["kind"]
    try:
        return {"kind": kind} | SHAPES[kind].model_validate(record).model_dump(exclude_unset=True)
    except ValidationError:
        return None
