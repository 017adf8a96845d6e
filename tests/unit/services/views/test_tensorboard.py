"""What TensorBoard's own reader finds in the event files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from services.views.tensorboard import TensorBoardSink, scalars

METRICS = {"loss": 2.5, "ce_loss": 4.0, "tau_probabilistic": 1.75, "accept_rate@0": 0.5, "accept_rate@1": 0.25}


def run(resumed_from_step: int | None = None) -> dict[str, Any]:
    return {"kind": "run", "time_s": 1.0, "resumed_from_step": resumed_from_step}


def step(number: int, loss: float = 2.5) -> dict[str, Any]:
    return {
        "kind": "step",
        "time_s": 100.0 + number,
        "step": number,
        "metrics": METRICS | {"loss": loss},
        "learning_rate": 1e-3,
        "tokens_per_s": 1200.0,
        "wait_s": 0.125,
        "step_s": 0.5,
        "wait_fraction": None if number == 1 else 0.25,
    }


def figures(number: int) -> dict[str, Any]:
    return {
        "kind": "figures",
        "time_s": 100.5 + number,
        "step": number,
        "tokens_captured": 1000 * number,
        "tokens_trained": 500 * number,
        "capture_tokens_per_s": 900.0,
        "resident_bytes": 4096,
        "peak_bytes": 8192,
        "capacity_bytes": 16384,
        "targets": [{"index": 0, "state": "serving"}, {"index": 1, "state": "loading"}],
    }


EVALUATION = {
    "kind": "evaluation",
    "time_s": 110.0,
    "label": "step_2",
    "step": 2,
    "accepted_length": 2.5,
    "interval": [2.25, 2.75],
    "accept_rate": [0.75, 0.5],
    "cond_accept_rate": [0.75, None],
    "domains": {
        "math": {"accepted_length": 2.75, "accept_rate": [0.25]},
        "code": {"accepted_length": None, "accept_rate": []},
    },
    "lossless": True,
}


def write(folder: Path, *records: dict[str, Any]) -> None:
    sink = TensorBoardSink(folder)
    for record in records:
        sink.take(record)
    sink.close()


def read(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder)).Reload()


def series(events: EventAccumulator, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_figures_have_the_names_that_people_look_for(tmp_path: Path) -> None:
    write(tmp_path / "tensorboard", run(), step(1), step(2), figures(2), EVALUATION)
    events = read(tmp_path / "tensorboard")
    expected = {
        "train/loss": [(1, 2.5), (2, 2.5)],
        "train/ce_loss": [(1, 4.0), (2, 4.0)],
        "train/expected_accepted_length": [(1, 1.75), (2, 1.75)],
        "train/accept_rate/0": [(1, 0.5), (2, 0.5)],
        "train/accept_rate/1": [(1, 0.25), (2, 0.25)],
        "train/learning_rate": [(1, pytest.approx(1e-3)), (2, pytest.approx(1e-3))],
        "throughput/train_tokens_per_s": [(1, 1200.0), (2, 1200.0)],
        "throughput/step_s": [(1, 0.5), (2, 0.5)],
        "throughput/wait_s": [(1, 0.125), (2, 0.125)],
        "throughput/wait_fraction": [(2, 0.25)],
        "throughput/capture_tokens_per_s": [(2, 900.0)],
        "throughput/tokens_captured": [(2, 2000.0)],
        "throughput/tokens_trained": [(2, 1000.0)],
        "buffer/resident_bytes": [(2, 4096.0)],
        "buffer/peak_bytes": [(2, 8192.0)],
        "buffer/capacity_bytes": [(2, 16384.0)],
        "targets/serving": [(2, 1.0)],
        "eval/accepted_length": [(2, 2.5)],
        "eval/accepted_length_low": [(2, 2.25)],
        "eval/accepted_length_high": [(2, 2.75)],
        "eval/accept_rate/0": [(2, 0.75)],
        "eval/accept_rate/1": [(2, 0.5)],
        "eval/cond_accept_rate/0": [(2, 0.75)],
        "eval/domains/math/accepted_length": [(2, 2.75)],
        "eval/domains/math/accept_rate/0": [(2, 0.25)],
    }
    assert {tag: series(events, tag) for tag in events.Tags()["scalars"]} == expected
    assert [event.wall_time for event in events.Scalars("train/loss")] == [101.0, 102.0]


def test_resumed_run_hides_the_steps_that_are_done_anew(tmp_path: Path) -> None:
    write(tmp_path, run(), step(1, 5.0), step(2, 4.0), step(3, 3.0), figures(3))
    write(tmp_path, run(resumed_from_step=2), figures(0), step(3, 2.0), step(4, 1.0))
    events = read(tmp_path)
    assert series(events, "train/loss") == [(1, 5.0), (2, 4.0), (3, 2.0), (4, 1.0)]
    # Figures before the first step of the second attempt belong to its checkpoint, or they would begin anew at 0.
    assert series(events, "buffer/resident_bytes") == [(2, 4096.0)]


def test_event_is_a_text_at_its_step(tmp_path: Path) -> None:
    write(tmp_path, run(), step(5), {"kind": "event", "time_s": 9.0, "event": "target", "message": "target 1 died"})
    events = read(tmp_path)
    (event,) = events.Tensors("events")
    assert (event.step, event.tensor_proto.string_val[0]) == (5, b"target: target 1 died")
    assert events.summary_metadata["events"].plugin_data.plugin_name == "text"


def test_records_without_figures_write_nothing(tmp_path: Path) -> None:
    write(tmp_path, {"kind": "end", "time_s": 9.0, "outcome": "finished", "message": ""})
    assert read(tmp_path).Tags()["scalars"] == []


def test_step_of_padding_alone_has_no_metrics() -> None:
    tags = [tag for tag, _ in scalars(step(1) | {"metrics": {}})]
    assert tags == [
        "train/learning_rate",
        "throughput/train_tokens_per_s",
        "throughput/step_s",
        "throughput/wait_s",
    ]
