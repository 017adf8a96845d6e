from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from services.errors import DeadlineError, ReplayError
from services.logs import EventLog, LogPlace, logged, set_step, start_logging, stop_logging


@pytest.fixture
def place(tmp_path: Path) -> Iterator[LogPlace]:
    yield LogPlace(folder=str(tmp_path / "logs"), run="demo-1a2b3c", role="trainer", rank=1)
    stop_logging()


def lines(place: LogPlace) -> list[dict[str, Any]]:
    return [json.loads(line) for line in place.path.read_text().splitlines()]


class Actor:
    """An actor."""

    def __init__(self, name: str) -> None:
        self.name = name
        logging.getLogger("services.test").info("made %s", name)

    def fail(self, error: Exception) -> None:
        raise error

    def greet(self, *, word: str = "hello") -> str:
        return f"{word} {self.name}"


def test_line_has_time_level_run_role_rank_step_and_message(place: LogPlace) -> None:
    start_logging(place)
    set_step(7)
    logging.getLogger("services.replay.shard").warning("buffer of %s is full", "32 MiB ↑")
    (line,) = lines(place)
    assert place.path.name == "trainer-1.jsonl"
    time = datetime.fromisoformat(line.pop("time"))
    assert time.utcoffset() == timedelta(0)
    assert line == {
        "level": "WARNING",
        "run": "demo-1a2b3c",
        "role": "trainer",
        "rank": 1,
        "step": 7,
        "logger": "services.replay.shard",
        "message": "buffer of 32 MiB ↑ is full",
    }


def test_part_that_there_is_one_of_has_no_rank(tmp_path: Path) -> None:
    place = LogPlace(folder=str(tmp_path), run="r", role="coordinator")
    start_logging(place)
    logging.getLogger("services.prompts").info("began")
    stop_logging()
    (line,) = lines(place)
    assert (line["rank"], line["step"]) == (None, None)
    assert place.path.name == "coordinator.jsonl"


def test_libraries_log_from_warning_on(place: LogPlace) -> None:
    start_logging(place)
    logging.getLogger("somelibrary").info("chatter")
    logging.getLogger("somelibrary").warning("trouble")
    logging.getLogger("trainer.loop").info("ours")
    assert [line["message"] for line in lines(place)] == ["trouble", "ours"]


def test_second_start_appends_and_closes_the_first(place: LogPlace) -> None:
    start_logging(place)
    logging.getLogger("trainer").info("one")
    start_logging(place)
    logging.getLogger("trainer").info("two")
    assert [line["message"] for line in lines(place)] == ["one", "two"]


def test_actor_logs_from_its_constructor_on(place: LogPlace) -> None:
    actor = logged(Actor, place)("left")
    assert actor.greet(word="good day") == "good day left"
    assert [line["message"] for line in lines(place)] == ["made left"]
    assert (type(actor).__name__, type(actor).__doc__) == ("Actor", "An actor.")


def test_defect_of_an_actor_is_logged_with_its_traceback_and_raised(place: LogPlace) -> None:
    actor = logged(Actor, place)("left")
    with pytest.raises(ZeroDivisionError):
        actor.fail(ZeroDivisionError("by nothing"))
    line = lines(place)[-1]
    assert (line["level"], line["message"]) == ("ERROR", "fail failed")
    assert "ZeroDivisionError: by nothing" in line["traceback"]
    assert "raise error" in line["traceback"]


def test_error_that_a_user_can_act_on_is_one_line_and_a_deadline_none(place: LogPlace) -> None:
    actor = logged(Actor, place)("left")
    with pytest.raises(ReplayError):
        actor.fail(ReplayError("the buffer is gone"))
    with pytest.raises(DeadlineError):
        actor.fail(DeadlineError("ask again"))
    line = lines(place)[-1]
    assert line["message"] == "fail: ReplayError: the buffer is gone"
    assert "traceback" not in line


def test_failure_of_a_thread_is_logged(place: LogPlace, capsys: pytest.CaptureFixture[str]) -> None:
    start_logging(place)
    thread = threading.Thread(target=Actor("x").fail, args=(ValueError("in a thread"),), name="pull-3")
    thread.start()
    thread.join()
    line = lines(place)[-1]
    assert line["message"] == "thread pull-3 failed"
    assert "ValueError: in a thread" in line["traceback"]
    assert "in a thread" in capsys.readouterr().err


def test_folder_that_cannot_be_written_costs_the_log_and_not_the_actor(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("no folder")
    actor = logged(Actor, LogPlace(folder=str(tmp_path / "file" / "logs"), run="r", role="target", rank=0))("right")
    assert actor.greet() == "hello right"
    assert "no log in" in capsys.readouterr().err


def test_event_log_tells_what_happened(place: LogPlace) -> None:
    start_logging(place)
    log = EventLog()
    log.take({"kind": "run", "attempt": 2, "run_id": "demo-1a2b3c", "command": "slipstream demo"})
    log.take({"kind": "step", "step": 12})
    log.take({"kind": "figures", "step": 12})
    log.take({"kind": "event", "event": "target", "message": "target 1 died"})
    log.take({"kind": "end", "outcome": "failed", "message": "the shard died"})
    log.close()
    assert [(line["level"], line["message"], line["step"]) for line in lines(place)] == [
        ("INFO", "attempt 2 of run demo-1a2b3c: slipstream demo", None),
        ("WARNING", "target: target 1 died", 12),
        ("ERROR", "failed: the shard died", 12),
    ]
