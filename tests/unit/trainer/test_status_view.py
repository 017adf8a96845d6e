from __future__ import annotations

from io import StringIO

import pytest
from rich.console import Console, RenderableType

from services.contracts import Autoscaling, Event, TargetState
from services.control.records import EvaluationPoint, RunStatus
from trainer.status_view import format_age, run_view, runs_view

STATUS = RunStatus(
    run_id="demo-1a2b3c",
    name="demo",
    output_dir="/out/demo",
    attempt=2,
    target_model="qwen3",
    algorithm="dspark",
    state="paused",
    phase="paused",
    step=1200,
    total_steps=2200,
    metrics={"loss": 2.5, "tau_probabilistic": 2.31, "accept_rate@0": 0.75, "accept_rate@1": 0.5},
    tokens_captured=123_456,
    resident_bytes=1024**2,
    capacity_bytes=32 * 1024**2,
    targets=(
        TargetState(index=0, state="serving", address="127.0.0.1:4711"),
        TargetState(index=1, state="pending", message="waits for 1 fpga, the cluster has 0 in all"),
    ),
    num_targets_wanted=2,
    num_targets_most=64,
    evaluations=(EvaluationPoint(label="step_0", step=0, accepted_length=1.2, interval=(1.1, 1.3)),),
    events=(Event(time_s=940.0, kind="scaling", message="targets scaled from 1 to 2"),),
    started_s=100.0,
    posted_s=999.5,
    host="node7",
    pid=4242,
)


def text(view: RenderableType) -> str:
    screen = StringIO()
    Console(file=screen, width=140, highlight=False).print(view)
    return screen.getvalue()


def test_run_view_shows_what_matters() -> None:
    shown = text(run_view(STATUS, now_s=1000.0))
    words = " ".join(shown.split())
    for what in (
        "demo-1a2b3c paused", "step 1,200 of 2,200", "expected accepted length 2.31", "position 2 0.50",
        "1.0 MiB of 32.0 MiB", "123,456 tokens", "2.500", "1 of 2 serving", "127.0.0.1:4711",
        "waits for 1 fpga, the cluster has 0 in all", "decoded τ step_0", "1.10 – 1.30", "1 min ago",
        "targets scaled from 1 to 2", "attempt 2", "driver 4242 on node7 for 15 min",
    ):  # fmt: skip
        assert what in words, f"{what!r} is missing in\n{shown}"
    assert "hangs" not in shown


@pytest.mark.parametrize(
    ("autoscaling", "says"),
    [
        (None, "at most 64"),
        (Autoscaling(is_on=True, min=1, max=4), "autoscaled between 1 and 4"),
        (Autoscaling(is_on=False, min=1, max=4), "autoscaling between 1 and 4 is suspended"),
    ],
)
def test_run_view_says_who_scales_the_targets(autoscaling: Autoscaling | None, says: str) -> None:
    status = STATUS.model_copy(update={"autoscaling": autoscaling, "num_targets_most": 64})
    assert says in text(run_view(status, now_s=1000.0))


def test_run_view_says_that_a_driver_is_silent() -> None:
    assert "has said nothing for 1 min" in text(run_view(STATUS, now_s=1060.0))


def test_run_view_of_a_run_that_has_just_begun() -> None:
    bare = STATUS.model_copy(update={"metrics": {}, "step": 0, "total_steps": 0, "targets": (), "events": ()})
    assert "step 0" in text(run_view(bare, now_s=1000.0))


def test_runs_view_has_a_line_for_each_run() -> None:
    lines = text(runs_view([STATUS, STATUS.model_copy(update={"run_id": "qwen-ffffff"})], 1000.0)).splitlines()
    assert len(lines) == 3
    assert lines[1].startswith("demo-1a2b3c")
    assert lines[2].startswith("qwen-ffffff")
    assert "no run is on this cluster" in text(runs_view([], 1000.0))


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(-1, "0 s"), (59.4, "59 s"), (60, "1 min"), (3599, "59 min"), (3600, "1 h 0 min"), (8000, "2 h 13 min")],
)
def test_format_age(seconds: float, shown: str) -> None:
    assert format_age(seconds) == shown
