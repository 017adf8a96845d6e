from __future__ import annotations

import json
from pathlib import Path

import pytest

from services.dashboard import tail
from services.dashboard.tail import JsonLinesTail


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "telemetry.jsonl"


def write(path: Path, text: str) -> None:
    with path.open("a") as file:
        file.write(text)


def test_tail_reads_on_where_it_stopped_and_says_where_each_record_ends(path: Path) -> None:
    reader = JsonLinesTail(path)
    write(path, '{"a":1}\n{"a":2}\n')
    assert reader.look().records == [(8, {"a": 1}), (16, {"a": 2})]
    assert reader.look().records == []
    write(path, '{"a":"ö"}\n')
    assert reader.look().records == [(27, {"a": "ö"})]


def test_tail_leaves_a_half_written_last_line_until_it_is_whole(path: Path) -> None:
    reader = JsonLinesTail(path)
    write(path, '{"a":1}\n{"a"')
    assert reader.look().records == [(8, {"a": 1})]
    write(path, ":2")
    assert reader.look().records == []
    write(path, "}\n")
    assert reader.look().records == [(16, {"a": 2})]


def test_tail_passes_over_lines_that_are_no_records(path: Path) -> None:
    write(path, '{"a":1}\n{"a\n\n[1]\n{"a":2}\n')
    reader = JsonLinesTail(path)
    assert [record for _, record in reader.look().records] == [{"a": 1}, {"a": 2}]
    assert reader.num_broken == 2


def test_tail_waits_for_a_file_that_is_not_there_yet(path: Path) -> None:
    reader = JsonLinesTail(path)
    lines = reader.look()
    assert (lines.records, lines.is_new_file, lines.is_all) == ([], False, True)
    write(path, '{"a":1}\n')
    lines = reader.look()
    assert lines.records == [(8, {"a": 1})]
    assert not lines.is_new_file, "nothing read before counts for nothing"


@pytest.mark.parametrize("how", ["replaced", "cut"])
def test_tail_begins_again_when_the_file_is_another_one(path: Path, how: str) -> None:
    reader = JsonLinesTail(path)
    write(path, '{"a":1}\n{"a":2}\n{"a"')
    reader.look()
    if how == "replaced":
        other = path.with_name("other")
        write(other, '{"b":1}\n{"b":2}\n{"b":3}\n{"b":4}\n')
        other.replace(path)
    else:
        path.write_text('{"b":1}\n')
    lines = reader.look()
    assert lines.is_new_file
    assert lines.records[0] == (8, {"b": 1})


def test_tail_takes_a_long_file_in_parts(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tail, "READ_BYTES", 10)
    write(path, "".join(json.dumps({"n": n}) + "\n" for n in range(30)))
    reader = JsonLinesTail(path)
    found: list[int] = []
    looks = 0
    while True:
        lines = reader.look()
        looks += 1
        found += [record["n"] for _, record in lines.records]
        if lines.is_all:
            break
    assert found == list(range(30))
    assert looks > 10
