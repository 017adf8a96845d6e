"""A history that somebody or something has spoiled: the page opens and shows what can be read."""

from __future__ import annotations

import asyncio
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from records import end, evaluation, event, figures, run, step

from services.dashboard.feed import Feed
from services.dashboard.history import History
from services.dashboard.server import _take_over
from services.dashboard.status import run_status

EXAMPLES = settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
SOUND = [
    run(0.0, host="here", pid=7), figures(1.0), step(1, 1.5), step(2, 2.0), figures(2.5, at_step=2),
    event(2.6, "pause"), evaluation(2.7, 2, 1.5), run(3.0, attempt=2, resumed_from_step=1), step(2, 3.5),
    figures(4.0, at_step=2), end(5.0),
]  # fmt: skip
leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 5),
    st.sampled_from([2**31, 2**63, 10**400, -(10**18), 5e-324, 1.7e308]),
    st.floats(),
    st.text(max_size=5),
    st.just("\ud800"),
)
values = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
)


@st.composite
def spoiled_records(draw: st.DrawFn) -> list[Any]:
    """The records of a run in some order, a few of whose fields are gone or something else."""
    records = [dict(record) for record in draw(st.lists(st.sampled_from(SOUND), max_size=8))]
    for record in records:
        if draw(st.integers(0, 2)) == 0:
            key = draw(st.sampled_from(sorted(record)))
            if draw(st.booleans()):
                del record[key]
            elif isinstance(record[key], dict):
                record[key] = record[key] | {draw(st.sampled_from(sorted(record[key]))): draw(values)}
            else:
                record[key] = draw(values)
    return records


def shows(history: History) -> None:
    """Everything that a page asks for can be sent to it."""
    picture = [
        run_status(history, 10.0, name="folder", silent_after_s=60.0),
        *(history.series(axis) for axis in ("step", "elapsed_s")),
        history.since(0),
        history.events,
        history.evaluations,
    ]
    json.dumps(picture, allow_nan=False)


@settings(EXAMPLES, max_examples=400)
@given(records=spoiled_records())
@example(records=[run(0.0), step(1, 1.0, loss=5e-324), step(2, 2.0, loss=1.7e308)])
@example(records=[run(0.0, pid="7"), figures(1.0, targets=[{"index": 0}])])
@example(records=[run(0.0), {**evaluation(1.0, 1, 2.0), "interval": [float("nan"), 1]}])
@example(records=[{**step(1, 1.0), "step": float("nan")}, {**end(1.0), "outcome": "exploded"}])
@example(records=[{"kind": ["step"], "time_s": 1.0}, {"kind": {}}])
def test_history_shows_what_can_be_read(records: list[Any]) -> None:
    history = History()
    for number, record in enumerate(records, start=1):
        before = len(history.steps), len(history.seconds), history.num_unreadable
        history.take(number, record)
        assert (len(history.steps), len(history.seconds)) == before[:2] or history.num_unreadable == before[2]
        shows(history)
    assert history.num_unreadable <= len(records)


@EXAMPLES
@given(lines=st.lists(st.one_of(st.binary(max_size=40), st.sampled_from(SOUND).map(lambda r: json.dumps(r).encode()))))
@example(lines=[b"[" * 100_000])
def test_page_opens_whatever_the_file_holds(tmp_path: Path, lines: list[bytes]) -> None:
    (tmp_path / "telemetry.jsonl").write_bytes(b"\n".join(lines))
    picture = asyncio.run(looked_at(tmp_path))
    assert set(picture) == {"id", "status", "series", "events", "evaluations"}


async def looked_at(output_dir: Path) -> Any:
    feed = Feed(output_dir)
    await feed.look()
    return json.loads(await feed.history("step", float("-inf"), float("inf")))


def test_lines_that_are_left_out_are_counted_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "telemetry.jsonl"
    unreadable = {key: value for key, value in step(2, 2.0).items() if key != "metrics"}
    lines = [json.dumps(record) for record in (run(0.0), step(1, 1.0), unreadable, step(3, 3.0))]
    path.write_text("\n".join([*lines, "{torn", ""]))
    with caplog.at_level(logging.WARNING):
        picture = asyncio.run(looked_at(tmp_path))
    assert picture["status"]["step"] == 3
    assert picture["series"]["loss"]["step"] == [1, 3]
    assert [record.getMessage() for record in caplog.records] == [
        f"{path}: 2 lines are no records of a run; they are left out"
    ]


@EXAMPLES
@given(
    content=st.one_of(
        st.binary(max_size=60),
        values.map(lambda value: json.dumps(value).encode()),
        st.fixed_dictionaries({"url": values, "token": values, "pid": values}).map(lambda v: json.dumps(v).encode()),
    )
)
@example(content=b"[" * 100_000)
@example(content=b'{"url": "http://127.0.0.1:99999/", "token": "0123456789abcdef", "pid": 1}')
@example(content=b'{"url": "http://127.0.0.1:0/", "token": "", "pid": 1}')
def test_place_of_an_earlier_dashboard_is_not_taken_over_unless_it_is_one(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "dashboard.json"
    file.write_bytes(content)
    assert _take_over(file, "127.0.0.1") is None
    assert file.read_bytes() == content
