from __future__ import annotations

from pathlib import Path

import pytest

from services.contracts import Traffic
from services.errors import CheckpointError
from services.prompts.capture_log import CaptureLog


def open_log(path: Path) -> CaptureLog:
    return CaptureLog(path, num_captures=4, num_prompts=2)  # captures 0 and 2, 1 and 3 are of the same prompts


def append(log: CaptureLog, capture: int, attempt: int = 0, why_again: str = "resumed") -> None:
    log.append(capture, capture % 2, attempt, num_tokens=10 + capture % 2, num_bytes=100, why_again=why_again)


def figures(log: CaptureLog) -> tuple[int, int, int, int]:
    return log.num_captured, log.num_recaptured, log.num_tokens, log.num_distinct_tokens


def test_counts_survive_reopening(tmp_path):
    path = tmp_path / "run" / "captures.jsonl"
    with open_log(path) as log:
        append(log, 0)
        append(log, 1)
        append(log, 2)
        append(log, 0, attempt=3)
        assert figures(log) == (4, 1, 41, 21)  # 10 + 11 + 10 + 10; prompts 0 and 1 once each
    with open_log(path) as log:
        assert figures(log) == (4, 1, 41, 21)
        assert [log.next_attempt(capture) for capture in range(4)] == [4, 1, 1, 0]
        append(log, 1, attempt=1, why_again="lost")
        assert figures(log) == (5, 2, 52, 21)
    reasons = [line.split('"reason":')[1].split(",")[0] for line in open_log(path).lines()]
    assert reasons == ['"first"', '"first"', '"first"', '"resumed"', '"lost"']


def test_attempt_already_logged_is_known(tmp_path):
    with open_log(tmp_path / "log") as log:
        append(log, 0, attempt=2)
        assert [log.has(0, attempt) for attempt in (1, 2, 3)] == [True, True, False]
        assert not log.has(1, 0)


def test_torn_last_line_is_cut_off(tmp_path):
    path = tmp_path / "log"
    with open_log(path) as log:
        append(log, 0)
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"capture":1,"pro')
    with open_log(path) as log:
        assert figures(log) == (1, 0, 10, 10)
        append(log, 1)
    assert path.read_bytes().startswith(whole + b'{"capture":1,"prompt":1,')
    path.write_bytes(b'{"capt')
    with open_log(path) as log:
        assert figures(log) == (0, 0, 0, 0)


def test_flushed_lines_are_in_the_file_without_closing(tmp_path):
    log = open_log(tmp_path / "log")
    append(log, 0)
    log.flush()
    assert (tmp_path / "log").read_text().count("\n") == 1
    log.close()
    assert len(list(log.lines())) == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"nonsense\n", "log:1: not a line of a capture log: 'nonsense'"),
        (b"\xff\xfe\n", "log:1: not a line of a capture log"),
        (
            b'{"capture":4,"prompt":0,"attempt":0,"reason":"first","num_tokens":1,"num_bytes":1}\n',
            "capture 4 of prompt 0 is outside the plan of 4 captures",
        ),
    ],
)
def test_foreign_log_is_refused(tmp_path, line, message):
    (tmp_path / "log").write_bytes(line)
    with pytest.raises(CheckpointError, match=message):
        open_log(tmp_path / "log")


def test_traffic_is_counted_by_the_dtype_of_its_time(tmp_path):
    path = tmp_path / "log"
    with open_log(path) as log:
        append(log, 0)
        append(log, 1)
    with CaptureLog(path, num_captures=4, num_prompts=2, dtype="fp8_e4m3") as log:
        append(log, 2)
        wanted = {"bf16": Traffic(num_tokens=21, num_bytes=200), "fp8_e4m3": Traffic(num_tokens=10, num_bytes=100)}
        assert log.traffic == wanted
    with open_log(path) as log:
        assert log.traffic == wanted


def test_lines_of_before_the_dtype_was_logged_count_as_what_travels_now(tmp_path):
    path = tmp_path / "log"
    path.write_text('{"capture":0,"prompt":0,"attempt":0,"reason":"first","num_tokens":7,"num_bytes":70}\n')
    with CaptureLog(path, num_captures=4, num_prompts=2, dtype="fp32") as log:
        assert log.traffic == {"fp32": Traffic(num_tokens=7, num_bytes=70)}
