from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from evaluation.report import Report
from services.contracts import Event, TargetState
from services.errors import ReplayUnavailableError
from services.telemetry import Journal
from trainer import observer as observer_module
from trainer.console import RunConsole
from trainer.observer import REDIS_AWAY_S, Observer

SERVING = TargetState(index=0, state="serving", address="127.0.0.1:5000")


class Parts:
    """What an observer looks at: telemetry, table and coordinator, each as it is at the moment."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []
        self.tokens_captured = self.tokens_trained = self.resident_bytes = 0
        self.written: list[dict[str, Any]] = []

    def read(self, block_ms: int) -> list[dict[str, Any]]:
        assert block_ms == 0, "the driver waits for no record"
        records, self.records = self.records, []
        return records

    def infos(self) -> list[Any]:
        return [SimpleNamespace(resident_bytes=self.resident_bytes, peak_bytes=2000, capacity_bytes=4000)]

    def take(self, record: dict[str, Any]) -> None:
        self.written.append(record)

    def close(self) -> None:
        pass

    def kinds(self) -> list[str]:
        return [record["kind"] for record in self.written]


@pytest.fixture
def parts() -> Parts:
    return Parts()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    now = SimpleNamespace(s=100.0)
    monkeypatch.setattr(observer_module.time, "monotonic", lambda: now.s)
    return now


@pytest.fixture
def observer(parts: Parts, clock: SimpleNamespace) -> Observer:
    return Observer(
        RunConsole(to_stderr=True), Journal([parts]), parts, parts, lambda: parts, lambda: [SERVING], 1000.0
    )  # type: ignore[arg-type,return-value]


def step(number: int, time_s: float, loss: float) -> dict[str, Any]:
    return {
        "kind": "step", "time_s": time_s, "step": number, "total_steps": 9, "metrics": {"loss": loss},
        "tokens_per_s": 5.0, "wait_fraction": None,
    }  # fmt: skip


def test_records_of_ranks_are_written_as_they_are_and_shown_as_running_means(observer: Observer, parts: Parts) -> None:
    parts.records = [step(1, 1007.5, 4.0), step(2, 1008.0, 2.0)]
    observer.look()
    assert [record for record in parts.written if record["kind"] == "step"] == [
        step(1, 1007.5, 4.0),
        step(2, 1008.0, 2.0),
    ]
    assert (observer.state.step, observer.state.total_steps, observer.state.metrics) == (2, 9, {"loss": 3.0})
    assert observer.first_step_s == 7.5


def test_figures_are_written_once_a_second_with_the_rate_of_capture(
    observer: Observer, parts: Parts, clock: SimpleNamespace
) -> None:
    observer.look()
    clock.s += 0.5
    observer.look()
    assert parts.kinds() == ["figures"]
    clock.s += 1.5
    parts.tokens_captured, parts.tokens_trained, parts.resident_bytes = 600, 200, 1500
    observer.look()
    figures = parts.written[-1]
    assert figures["capture_tokens_per_s"] == 600 / 2.0
    assert (figures["tokens_captured"], figures["tokens_trained"]) == (600, 200)
    assert figures["shard_bytes"] == [1500]
    assert (figures["resident_bytes"], figures["peak_bytes"], figures["capacity_bytes"]) == (1500, 2000, 4000)
    assert figures["targets"] == [{"index": 0, "state": "serving", "address": "127.0.0.1:5000", "message": ""}]


def test_phase_is_recorded_at_once_and_the_first_step_begins_training(observer: Observer, parts: Parts) -> None:
    observer.phase("filling the replay buffer")
    parts.records = [step(1, 1001.0, 1.0)]
    observer.look()
    assert [record.get("phase") for record in parts.written] == [
        "filling the replay buffer",
        None,
        "training",
        "training",
    ]


def test_beat_asks_nobody(observer: Observer, parts: Parts, clock: SimpleNamespace) -> None:
    parts.tokens_captured = 7
    for _ in range(4):
        observer.beat()
        clock.s += 0.4
    assert [record["tokens_captured"] for record in parts.written] == [0, 0], "at 0 s and at 1.2 s, with what is known"


def test_events_of_driver_and_parts_are_recorded_alike(observer: Observer, parts: Parts) -> None:
    parts.records = [{"kind": "event", "time_s": 5.0, "event": "skip", "message": "no tokens"}]
    observer.drain()
    observer.report(Event(time_s=6.0, kind="restart", message="target 0 restarted"))
    assert parts.written == [
        {"kind": "event", "time_s": 5.0, "event": "skip", "message": "no tokens"},
        {"kind": "event", "time_s": 6.0, "event": "restart", "message": "target 0 restarted"},
    ]
    assert [event.kind for event in observer.events] == ["skip", "restart"]


@pytest.fixture
def away(observer: Observer, parts: Parts, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Makes Redis answer nothing from now on."""

    def gone() -> list[Any]:
        raise ReplayUnavailableError("Redis does not answer")

    return lambda: monkeypatch.setattr(parts, "infos", gone)


def test_redis_that_stays_away_ends_the_run(
    observer: Observer, clock: SimpleNamespace, away: Callable[[], None]
) -> None:
    observer.look()
    away()
    for _ in range(int(REDIS_AWAY_S)):
        clock.s += 1.0
        observer.look()
    clock.s += 1.1
    with pytest.raises(ReplayUnavailableError):
        observer.look()


def test_time_in_which_the_driver_was_elsewhere_does_not_count_as_redis_away(
    observer: Observer, parts: Parts, clock: SimpleNamespace, away: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    away()
    observer.look()
    clock.s += 10 * REDIS_AWAY_S  # brought a part back between two looks
    observer.look()

    def slow() -> Parts:
        clock.s += 10 * REDIS_AWAY_S  # and within one
        return parts

    monkeypatch.setattr(observer, "_progress", slow)
    clock.s += 1.0
    observer.look()


VALUES: dict[str, Any] = dict.fromkeys(Report.model_fields, 0) | {
    "label": "step_40", "checkpoint": "/runs/demo/step_40", "accepted_length": 2.5, "interval": (2.4, 2.6),
    "accept_rate": (0.8, 0.5), "cond_accept_rate": (0.8, None), "lossless": True, "first_divergence": None,
    "num_samples": 9, "began_s": 7.5, "samples": (), "weights": "",
    "domains": {"math": {"num_samples": 9, "accepted_length": 2.5, "interval": None, "accept_rate": ()}},
}  # fmt: skip


def test_output_that_left_the_targets_own_is_shown_with_its_gap(
    observer: Observer, parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {
        "sample": 3, "position": 17, "target_token": 5, "our_token": 6, "top2_gap": 0.03125, "token_gap": 0.03125,
        "within_rounding": True,
    }  # fmt: skip
    said: list[str] = []
    monkeypatch.setattr(observer._console, "say", said.append)
    observer.show_report(Report.model_validate(VALUES | {"first_divergence": found}))
    (record,) = parts.written
    assert record["first_divergence"] == found
    assert said[1] == (
        "greedy output of prompt 3 left the target's own at new token 17, where the target's two largest logits are "
        "0.0312 apart, a tie as its dtype rounds"
    )


def test_evaluations_are_recorded_with_their_step(observer: Observer, parts: Parts) -> None:
    observer.show_report(Report.model_validate(VALUES))
    (record,) = parts.written
    del record["time_s"]
    assert record == {
        "kind": "evaluation", "label": "step_40", "step": 40, "accepted_length": 2.5, "interval": (2.4, 2.6),
        "accept_rate": (0.8, 0.5), "cond_accept_rate": (0.8, None), "lossless": True, "num_samples": 9, "began_s": 7.5,
        "domains": {"math": {"num_samples": 9, "accepted_length": 2.5, "interval": None, "accept_rate": []}},
        "first_divergence": None,
    }  # fmt: skip
