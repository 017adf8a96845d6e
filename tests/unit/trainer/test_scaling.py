"""What the autoscaler sees of a run, and what becomes of its decisions; e2e/test_autoscaling.py has a real run."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from services.contracts import Event, TableInfo, TargetState
from services.control.board import StatusBoard
from services.control.records import RunStatus
from services.errors import UsageError
from services.target.config import TargetConfig
from trainer import scaling as scaling_module
from trainer.scaling import TargetScaling, ready_fill

SUSPENDED = "autoscaling is suspended until `slipstream scale demo-1a2b3c autoscale=on`"

AUTOSCALED = TargetConfig.model_validate({"model": "m", "autoscale": {"max": 4, "window_s": 4.0, "up_cooldown_s": 0}})


def table(**fields: Any) -> TableInfo:
    known = {
        "resident_bytes": 0, "peak_bytes": 0, "wanted_bytes": 0, "capacity_bytes": 1000, "num_ready": 0,
        "num_ready_uses": 0, "num_leased": 0, "num_inserting": 0, "inserts": 0, "samples": 0, "deletes": 0,
        "sealed": False, "generation": 1, "max_times_sampled": 1, "selector": "fifo", "min_size": 1,
        "samples_per_insert": 1, "min_diff": None, "max_diff": None, "difference": 0, "can_insert": True,
        "can_sample": True,
    }  # fmt: skip
    return TableInfo(**(known | fields))


class Pool:
    """Targets that serve at once, and the reasons they came and went for."""

    def __init__(self) -> None:
        self.targets = [TargetState(index=0, state="serving")]
        self.scaled: list[tuple[int, str]] = []

    def states(self) -> list[TargetState]:
        return self.targets

    def scale(self, replicas: int, reason: str = "") -> None:
        if replicas > 64:
            raise UsageError(f"targets={replicas} is too many")
        self.scaled.append((replicas, reason))
        self.targets = [TargetState(index=index, state="serving") for index in range(replicas)]


class Run:
    """A run's scaling, and what is around it."""

    def __init__(self, config: TargetConfig, clock: SimpleNamespace) -> None:
        status = RunStatus(
            run_id="demo-1a2b3c", name="demo", output_dir="/out", attempt=1, target_model="t", algorithm="dspark",
            state="training", started_s=0.0, posted_s=0.0, host="h", pid=1, num_targets_wanted=1,
        )  # fmt: skip
        self.clock = clock
        self.pool = Pool()
        self.board = StatusBoard(status)
        self.events: list[Event] = []
        self.scaling = TargetScaling(config, self.pool, self.board, 500, self.events.append)  # type: ignore[arg-type]
        self.step = 0

    def train(self, steps: int, wait_s: float = 1.5, **fields: Any) -> None:
        """Steps of two seconds, and a look after each."""
        for _ in range(steps):
            self.step += 1
            self.clock.s += 2.0
            self.scaling.take({"kind": "step", "step": self.step, "total_steps": 1000, "step_s": 2.0, "wait_s": wait_s})
            self.scaling.look([table(**fields)])


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    now = SimpleNamespace(s=100.0)
    monkeypatch.setattr(scaling_module.time, "monotonic", lambda: now.s)
    return now


@pytest.fixture
def run(clock: SimpleNamespace) -> Run:
    return Run(AUTOSCALED, clock)


def test_waiting_trainer_gets_targets_and_everyone_the_reason(run: Run) -> None:
    run.train(3)
    why = "the trainer waited 75 % of 4 s and 0 % of the buffer held samples for it"
    assert run.pool.scaled == [(2, why)]
    assert run.board.status.num_targets_wanted == 2
    run.train(10)
    assert [targets for targets, _ in run.pool.scaled] == [2, 4]
    (event,) = run.events
    assert event.kind == "autoscale"
    assert event.message == f"{why}, but all 4 targets that target.autoscale.max allows are there"


def test_buffer_full_of_ready_samples_is_no_reason_for_targets(run: Run) -> None:
    run.train(10, resident_bytes=1000, num_ready=5, inserts=10)
    assert run.pool.scaled == []


def test_samples_under_way_are_not_ready() -> None:
    assert ready_fill([table(resident_bytes=800, num_ready=2, inserts=9, deletes=6, num_inserting=5)]) == 0.2
    assert ready_fill([table(resident_bytes=600, num_ready=3, inserts=3), table()]) == 0.3
    assert ready_fill([table()]) == 0.0


@pytest.mark.parametrize("state", ["starting", "pausing", "paused", "stopping", "measuring"])
def test_run_that_does_not_train_is_left_alone(run: Run, state: Any) -> None:
    run.board.set(state=state)
    run.train(10)
    assert run.pool.scaled == []


def test_plan_without_captures_to_come_is_left_alone(run: Run) -> None:
    run.train(10, sealed=True)
    assert run.pool.scaled == []


def test_time_of_a_checkpoint_is_no_wait(run: Run) -> None:
    run.step = 496
    run.train(4, wait_s=0.0)
    run.clock.s += 60.0
    run.scaling.look([table()])
    assert run.pool.scaled == []
    run.train(1, wait_s=0.0)
    run.clock.s += 60.0
    run.scaling.look([table()])
    assert len(run.pool.scaled) == 1, "nothing else takes a trainer so long"


def test_wait_for_what_was_lost_is_no_want_of_targets(run: Run) -> None:
    for _ in range(5):
        run.scaling.take({"kind": "event", "event": "redis", "message": "it restarted"})
        run.train(2)
    assert run.pool.scaled == []
    run.train(2)
    assert run.pool.scaled != []


def test_targets_that_come_back_are_waited_for_and_missing_resources_named(run: Run) -> None:
    run.pool.targets.append(TargetState(index=1, state="silent"))
    run.train(10)
    assert run.pool.scaled == []
    run.pool.targets[1] = TargetState(
        index=1, state="pending", message="waits for 1 GPU, of the cluster's 1 are 0 free"
    )
    run.train(10)
    assert run.pool.scaled == []
    (event,) = run.events
    assert event.message.endswith(
        "but no more targets are asked for while target 1 waits for 1 GPU, of the cluster's 1 are 0 free"
    )


def test_scaling_by_hand_suspends_until_it_is_switched_on_again(run: Run) -> None:
    assert run.scaling.by_hand(6) == SUSPENDED
    assert run.pool.scaled == [(6, "by hand")]
    status = run.scaling.status()
    assert status is not None
    assert not status.is_on
    run.train(10)
    assert run.scaling.by_hand(5) == ""
    assert len(run.pool.scaled) == 2
    assert run.scaling.autoscale(True) == "targets are autoscaled between 1 and 4"
    run.train(1)
    assert run.pool.scaled[2:] == [(4, "autoscaling keeps them between 1 and 4")]
    assert run.scaling.autoscale(False) == SUSPENDED
    assert [event.message for event in run.events] == [SUSPENDED, "targets are autoscaled between 1 and 4", SUSPENDED]


def test_refused_number_suspends_nothing(run: Run) -> None:
    with pytest.raises(UsageError):
        run.scaling.by_hand(65)
    run.train(3)
    assert len(run.pool.scaled) == 1


def test_recipe_without_bounds_scales_by_hand_alone(clock: SimpleNamespace) -> None:
    run = Run(TargetConfig(model="m"), clock)
    run.train(10)
    assert run.scaling.by_hand(3) == ""
    assert run.pool.scaled == [(3, "")]
    assert run.scaling.status() is None
    with pytest.raises(UsageError, match=r"no target\.autoscale"):
        run.scaling.autoscale(True)
