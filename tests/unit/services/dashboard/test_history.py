from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import pytest
from records import Record, end, evaluation, event, figures, run, step

from services.dashboard import history as history_module
from services.dashboard.history import History


def told(records: Iterable[Record], history: History | None = None) -> History:
    """A history that has taken these, each ten bytes long."""
    history = history or History()
    for record in records:
        history.take(history.offset + 10, record)
    return history


def test_history_keeps_a_row_for_each_step_and_second() -> None:
    history = told([run(100.0), figures(101.0), step(1, 102.0, loss=3.0), figures(102.5, at_step=1), step(2, 103.0)])
    series = history.series()
    assert series["loss"] == {"step": [1, 2], "elapsed_s": [2.0, 3.0], "value": [3.0, 1.0]}
    assert series["loss_smooth"]["value"] == [3.0, 2.0]
    assert series["accept_rate@1"]["value"] == [0.25, 0.25]
    assert series["resident_bytes"]["step"] == [0, 1]
    assert series["resident_bytes"]["elapsed_s"] == [1.0, 2.5]
    assert (history.num_steps, history.total_steps, history.elapsed_s) == (2, 100, 3.0)


def test_smoothing_is_the_mean_at_first_and_then_follows_slowly() -> None:
    losses = [4.0, 2.0, 3.0, *[1.0] * 30]
    history = told(step(number, 100.0 + number, loss=loss) for number, loss in enumerate(losses, start=1))
    smooth = history.series()["loss_smooth"]["value"]
    assert smooth[:3] == [4.0, 3.0, 3.0]
    assert smooth[19] == pytest.approx((4 + 2 + 3 + 17) / 20, rel=1e-5), "the mean of the first twenty"
    assert smooth[20] == pytest.approx(1.3 + (1 - 1.3) / 20, rel=1e-5)


def test_wait_is_the_part_of_each_step() -> None:
    history = told([step(1, 100.0, wait_s=0.2)])
    assert history.series()["wait"]["value"] == [0.4]


def test_resumed_attempt_replaces_the_steps_after_its_checkpoint() -> None:
    first = [run(100.0), *(step(number, 100.0 + number, loss=1.0) for number in range(1, 8)), evaluation(107.5, 0, 1.1)]
    history = told(first)
    told([run(1000.0, attempt=2, resumed_from_step=5), step(6, 1003.0, loss=2.0)], history)
    loss = history.series()["loss"]
    assert loss["step"] == [1, 2, 3, 4, 5, 6]
    assert loss["value"] == [1.0] * 5 + [2.0]
    assert loss["elapsed_s"] == [1.0, 2.0, 3.0, 4.0, 5.0, 8.0], "the gap between the attempts is no time of the run"
    assert [(found["event"], found["step"]) for found in history.events] == [("resume", 5)]
    assert [found["step"] for found in history.evaluations] == [0]


def test_attempt_without_checkpoint_starts_the_curve_anew() -> None:
    history = told([run(100.0), step(1, 101.0), step(2, 102.0), evaluation(103.0, 2, 1.5)])
    told([run(200.0, attempt=2), step(1, 205.0, loss=9.0)], history)
    assert history.series()["loss"] == {"step": [1], "elapsed_s": [5.0], "value": [9.0]}
    assert history.evaluations == []


def test_steps_trained_again_count_once_even_without_a_run_record() -> None:
    history = told([step(1, 1.0, loss=1.0), step(2, 2.0, loss=1.0), step(3, 3.0, loss=1.0), step(2, 10.0, loss=5.0)])
    loss = history.series()["loss"]
    assert (loss["step"], loss["value"]) == ([1, 2], [1.0, 5.0])


def test_series_that_are_no_numbers_have_no_points_there() -> None:
    lone = step(1, 1.0)
    lone["metrics"] = {}  # a step of padding alone
    history = told([lone, step(2, 2.0, loss=math.inf), step(3, 3.0, loss=1.0)])
    assert history.series()["loss"]["step"] == [3]
    assert history.series()["learning_rate"]["step"] == [1, 2, 3]


def test_numbers_are_short_and_keep_six_digits() -> None:
    losses = [0.0, -1.2345678e-9, 123456789.0, 0.1 + 0.2]
    history = told(step(number, float(number), loss=loss) for number, loss in enumerate(losses, start=1))
    assert history.series()["loss"]["value"] == pytest.approx([0.0, -1.23457e-9, 123457000.0, 0.3], rel=1e-12)


def test_long_series_are_decimated_with_their_real_extremes() -> None:
    rng = np.random.default_rng(0)
    losses = rng.normal(size=5000).round(5).tolist()
    history = told(step(number, number / 10, loss=loss) for number, loss in enumerate(losses, start=1))
    loss = history.series(num_buckets=50)["loss"]
    assert len(loss["value"]) <= 200
    assert (min(loss["value"]), max(loss["value"])) == (min(losses), max(losses))
    assert all(losses[int(number) - 1] == value for number, value in zip(loss["step"], loss["value"], strict=True))


def test_part_of_the_axis_comes_with_its_detail() -> None:
    history = told(step(number, number / 2) for number in range(1, 1001))
    assert history.series("step", 10, 14, num_buckets=5)["loss"]["step"] == [10, 11, 12, 13, 14]
    assert history.series("elapsed_s", 100, 101)["loss"]["step"] == [201, 202, 203]


def test_since_is_what_came_behind_a_place() -> None:
    history = told([run(0.0), step(1, 1.0), figures(1.5, at_step=1), event(1.6, "restart")])
    offset = history.offset
    told([step(2, 2.0), event(2.5, "skip", "no tokens"), evaluation(3.0, 1, 1.5)], history)
    news = history.since(offset)
    assert news is not None
    assert news["series"]["loss"] == {"step": [2], "elapsed_s": [2.0], "value": [1.0]}
    assert "resident_bytes" not in news["series"]
    assert [found["message"] for found in news["events"]] == ["no tokens"]
    assert [found["accepted_length"] for found in news["evaluations"]] == [1.5]
    nothing = history.since(history.offset)
    assert nothing == {"series": {}, "events": [], "evaluations": []}


def test_reader_behind_a_cut_must_read_everything_again() -> None:
    history = told([run(0.0), step(1, 1.0), step(2, 2.0)])
    offset = history.offset
    told([run(10.0, attempt=2, resumed_from_step=1), step(2, 12.0)], history)
    assert history.since(offset) is None
    assert history.since(history.offset) is not None


def test_reader_of_another_or_too_long_history_must_read_everything_again(monkeypatch: pytest.MonkeyPatch) -> None:
    history = told(step(number, float(number)) for number in range(1, 50))
    assert history.since(history.offset + 1) is None
    monkeypatch.setattr(history_module, "MOST_LIVE_ROWS", 10)
    assert history.since(0) is None


def test_evaluation_lies_where_its_step_was_done_and_is_the_newest_of_it() -> None:
    history = told([run(100.0), step(1, 101.0), step(2, 102.0)])
    told([evaluation(150.0, 2, 2.0), evaluation(160.0, 0, 1.0), evaluation(170.0, 2, 2.5)], history)
    assert [(found["step"], found["accepted_length"], found["elapsed_s"]) for found in history.evaluations] == [
        (0, 1.0, 0.0),
        (2, 2.5, 2.0),
    ]


def test_speed_is_of_this_attempt() -> None:
    history = told([run(0.0), *(step(number, number * 10.0) for number in range(1, 6))])
    assert history.steps_per_s() == pytest.approx(0.1)
    told([run(500.0, attempt=2, resumed_from_step=5), step(6, 600.0)], history)
    assert history.steps_per_s() is None
    told([step(7, 602.0)], history)
    assert history.steps_per_s() == pytest.approx(0.5)


def test_unknown_kinds_are_left_out() -> None:
    history = told([{"kind": "weather", "time_s": 1.0}, {"no": "kind"}, step(1, 2.0)])
    assert history.num_steps == 1


def test_end_is_forgotten_when_the_run_goes_on() -> None:
    history = told([run(0.0), step(1, 1.0), end(2.0, "stopped")])
    assert history.end is not None
    told([run(10.0, attempt=2, resumed_from_step=1)], history)
    assert history.end is None


def test_steering_holds_until_it_is_taken_back() -> None:
    history = told([run(0.0), step(1, 1.0), event(2.0, "pause")])
    assert history.steered == "paused"
    told([event(2.5, "restart")], history)
    assert history.steered == "paused"
    told([event(3.0, "continue")], history)
    assert history.steered is None
    told([event(4.0, "stop")], history)
    assert history.steered == "stopping"
    told([run(10.0, attempt=2, resumed_from_step=1)], history)
    assert history.steered is None
