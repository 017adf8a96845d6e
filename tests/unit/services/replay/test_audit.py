"""Every way in which a table's counters and keys can disagree is found, and nothing else."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest

from services.replay.audit import SampleKeys, Snapshot, find_problems
from services.replay.extents import Extent

SOUND = Snapshot(
    counters={
        "resident": "150", "peak": "150", "capacity": "200", "uses": "3", "taken": "2", "promised": "3",
        "promising": "1", "inserts": "4", "deletes": "2",
    },
    samples={
        1: SampleKeys("resident", 0, 60, 2, num_uses=2, unacked=1, promise=2),
        2: SampleKeys("resident", 3, 40, 1, num_uses=1, unacked=1, promise=1),
        3: SampleKeys("inserting", 1, 50, 2, stored_bytes=30, promise=1),
    },
    chunks={(1, 0, 0): 40, (1, 0, 1): 20, (2, 3, 0): 40, (3, 1, 0): 20, (3, 1, 1): 0},
    uses={1: {1}},
    inserting={3},
    ready={1},
    weights={1},
    leases={"x.7": (2, 0)},
    deadlines={"x.7"},
    jobs={3: 1, 4: 0, 5: 2},
    queue={4, 9},
    taken={3, 5},
)  # fmt: skip
"""Capture 1 has one use acked and one ready, 2 is leased, 3 in flight, 4 waits, 5 is taken and not yet admitted; 9 was
given up while it waited."""


def test_sound_table_has_no_problems() -> None:
    assert find_problems(SOUND) == []
    assert find_problems(Snapshot()) == []
    places = {1: (Extent(0, 40), Extent(60, 80)), 2: (Extent(80, 120),), 3: (Extent(40, 60),)}
    assert find_problems(replace(SOUND, extents=places, freed=(Extent(120, 130),))) == []


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"counters": SOUND.counters | {"resident": "149"}}, "resident is counted as 149, the samples make it 150"),
        ({"counters": SOUND.counters | {"peak": "201"}}, "peak bytes 201 are above the capacity 200"),
        ({"counters": SOUND.counters | {"taken": "1"}}, "taken is counted as 1, the samples make it 2"),
        ({"counters": SOUND.counters | {"promising": "0"}}, "promising is counted as 0, the samples make it 1"),
        ({"counters": SOUND.counters | {"deletes": "1"}}, "4 inserts less 1 deletes are not the 2 samples"),
        ({"counters": {}}, "there is no table, but 3 samples and 5 chunks"),
        ({"chunks": SOUND.chunks | {(3, 0, 0): 20}}, r"chunks that are not those that samples name: \(3, 0, 0\)"),
        ({"chunks": {**SOUND.chunks, (1, 0, 1): 19}}, "capture 1 is counted with 60 bytes, its chunks have 59"),
        ({"chunks": {**SOUND.chunks, (3, 1, 1): 11}}, "capture 3 in flight has 31 bytes in chunks, made room for 30"),
        ({"extents": {1: (Extent(0, 40), Extent(60, 80)), 2: (Extent(79, 119),)}}, "79 to 80 .* capture 1 and to capt"),
        ({"extents": {1: (Extent(0, 60),)}, "freed": (Extent(59, 61),)}, "59 to 60 .* and to what was freed"),
        ({"freed": (Extent(7, 9), Extent(7, 9))}, "7 to 9 of the arena belong to what was freed and to wha"),
        ({"inserting": set()}, "their samples that are not captures in flight: 3"),
        ({"ready": {1, 2}, "weights": {1, 2}}, "samples that are ready that are not samples with uses: 2"),
        ({"weights": set()}, "ready ones that are not weighed samples: 1"),
        ({"uses": {1: {1}, 8: {0}}, "ready": {1, 8}, "weights": {1, 8}}, "uses of no committed sample: 8"),
        ({"leases": {}, "deadlines": set()}, "capture 2 has 1 uses to be acked, 0 are ready or leased"),
        ({"deadlines": set()}, "leases that are not deadlines: x.7"),
        ({"leases": SOUND.leases | {"x.8": (1, 1)}, "deadlines": {"x.7", "x.8"}}, "use 1 of capture 1 is leased 1"),
        ({"leases": SOUND.leases | {"x.8": (6, 0)}, "deadlines": {"x.7", "x.8"}}, "samples that are not here: 6"),
        ({"jobs": {4: 0, 5: 2}}, "captures in flight without a job: 3"),
        ({"jobs": SOUND.jobs | {3: 0}}, "capture 3 is in flight with attempt 1, its job has 0"),
        ({"queue": set()}, "jobs neither waiting nor taken: 4"),
        ({"taken": {3, 5, 7}}, "taken jobs that do not exist: 7"),
    ],
)  # fmt: skip
def test_contradiction_is_named(changes: dict[str, Any], problem: str) -> None:
    found = find_problems(replace(SOUND, **changes))
    assert any(re.search(problem, line) for line in found), found
