from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from services.telemetry import HistoryFile, Journal


class Memory:
    """A sink that remembers."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []
        self.num_closed = 0

    def take(self, record: dict[str, Any]) -> None:
        self.records.append(record)

    def close(self) -> None:
        self.num_closed += 1


def test_journal_hands_every_record_to_every_sink_with_kind_and_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.telemetry.time.time", lambda: 7.5)
    one, two = Memory(), Memory()
    journal = Journal([one, two])
    journal.write("event", event="restart", message="again")
    journal.write("event", time_s=3.0, event="skip", message="no tokens")
    journal.take({"kind": "step", "time_s": 1.0, "step": 4})
    assert one.records == two.records
    assert one.records == [
        {"kind": "event", "time_s": 7.5, "event": "restart", "message": "again"},
        {"kind": "event", "time_s": 3.0, "event": "skip", "message": "no tokens"},
        {"kind": "step", "time_s": 1.0, "step": 4},
    ]
    journal.close()
    journal.close()
    assert (one.num_closed, two.num_closed) == (1, 1)


def test_history_file_appends_to_what_earlier_attempts_wrote(tmp_path: Path) -> None:
    path = tmp_path / "telemetry.jsonl"
    for step in (1, 2):
        history = HistoryFile(path)
        history.take({"kind": "step", "step": step})
        assert json.loads(path.read_text().splitlines()[-1])["step"] == step, "written at once"
        history.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]


def test_history_file_ends_a_line_that_a_killed_attempt_left_half_written(tmp_path: Path) -> None:
    path = tmp_path / "telemetry.jsonl"
    path.write_text('{"step":1}\n{"ste')
    history = HistoryFile(path)
    history.take({"step": 2})
    history.close()
    assert path.read_text() == '{"step":1}\n{"ste\n{"step":2}\n'
