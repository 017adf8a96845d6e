from __future__ import annotations

import math
from typing import Any

import pytest
from records import MIB, Record, end, evaluation, event, figures, run, step

from services.dashboard.history import History
from services.dashboard.status import duration, run_status

RUNNING = [run(0.0), figures(1.0), step(1, 2.0), figures(3.0, at_step=1), step(2, 4.0)]


def status(*records: Record, now_s: float = 5.0, silent_after_s: float = 60.0) -> dict[str, Any]:
    history = History()
    for offset, record in enumerate(records, start=1):
        history.take(offset, record)
    return run_status(history, now_s, name="folder", silent_after_s=silent_after_s)


@pytest.mark.parametrize(
    ("records", "state", "is_live"),
    [
        ([], "empty", False),
        ([run(0.0), figures(1.0)], "starting", True),
        (RUNNING, "running", True),
        ([*RUNNING, event(4.5, "pause")], "paused", True),
        ([*RUNNING, event(4.5, "stop")], "stopping", True),
        ([*RUNNING, end(4.5, "stopped")], "stopped", False),
        ([*RUNNING, end(4.5, "failed", "no GPU")], "failed", False),
        ([*RUNNING, end(4.5)], "finished", False),
    ],
)
def test_state_follows_from_the_newest_records(records: list[Record], state: str, is_live: bool) -> None:
    found = status(*records)
    assert (found["state"], found["is_live"]) == (state, is_live)


def test_run_that_ended_without_saying_so_says_how_to_go_on() -> None:
    found = status(*RUNNING, now_s=4.0 + 600)
    assert found["state"] == "silent"
    assert "Nothing has been heard of the run for 10 min" in found["explanation"]
    assert found["explanation"].endswith("slipstream run demo.yaml")
    gone = status(*RUNNING, silent_after_s=0.0)
    assert gone["explanation"].startswith("The run ended 1 s ago without saying so")


def test_living_driver_may_be_silent_for_as_long_as_it_likes() -> None:
    assert status(*RUNNING, now_s=1e6, silent_after_s=math.inf)["state"] == "running"


def test_failure_is_named() -> None:
    found = status(*RUNNING, end(5.0, "failed", "target 0 died"))
    assert found["explanation"].startswith("The run failed: target 0 died.")


def test_numbers_are_those_of_the_newest_records() -> None:
    found = status(*RUNNING, figures(4.5, at_step=2, resident=16 * MIB))
    assert (found["step"], found["total_steps"], found["attempt"]) == (2, 100, 1)
    assert (found["loss"], found["expected"], found["train_tokens_per_s"]) == (1.0, 2.0, 800.0)
    assert (found["resident_bytes"], found["capacity_bytes"]) == (16 * MIB, 32 * MIB)
    assert found["left_s"] == pytest.approx(98 * 2.0), "two seconds a step"
    assert found["age_s"] == 0.5
    assert found["bottleneck"]["who"] == "train"


def test_decoded_tau_is_the_first_and_the_last_of_several() -> None:
    assert status(*RUNNING)["tau_first"] is None
    one = status(*RUNNING, evaluation(4.5, 0, 1.1))
    assert (one["tau_first"]["accepted_length"], one["tau_last"]) == (1.1, None)
    two = status(*RUNNING, evaluation(4.6, 2, 1.9), evaluation(4.5, 0, 1.1))
    assert (two["tau_first"]["accepted_length"], two["tau_last"]["accepted_length"]) == (1.1, 1.9)


def test_bottleneck_counts_targets_that_shall_stay() -> None:
    targets = [
        {"index": 0, "state": "serving", "address": "a:1", "message": ""},
        {"index": 1, "state": "pending", "address": None, "message": "needs 1 GPU"},
        {"index": 2, "state": "draining", "address": "a:2", "message": ""},
    ]
    slow = step(3, 4.6, wait_s=0.4)
    found = status(run(0.0), slow, figures(4.8, at_step=3, resident=0, targets=targets))["bottleneck"]
    assert found["who"] == "capture"
    assert "only 1 of 2 targets serve" in found["text"]
    assert found["advice"] == "target 1 is pending: needs 1 GPU"


def test_history_of_an_older_version_still_opens() -> None:
    found = status(step(1, 1.0), step(2, 2.0), now_s=1e4)
    assert (found["state"], found["run_id"], found["resident_bytes"]) == ("silent", "folder", None)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (119, "119 s"),
        (120, "2 min"),
        (3599, "59 min"),
        (3900, "1 h 5 min"),
        (2 * 86400 + 3600, "2 d 1 h"),
    ],
)
def test_durations_are_for_people(seconds: float, text: str) -> None:
    assert duration(seconds) == text
