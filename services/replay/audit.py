"""Holds a table's counters against its keys: what leaked, what is counted twice, what is over the capacity.

    resident   = bytes of samples, committed and in flight ≤ capacity
    chunks     = those that the samples name, with their bytes, as keys or as extents of the arena
    extents    of samples, and those freed since the arena's writer last looked: no byte in two of them
    taken      = uses that are leased or acked, unacked = uses that are ready or leased
    in flight  ⇒ its job is in the work queue, so that a shard that died costs none

The law holds at every moment, also of a table at work, and after a SIGKILL of anyone.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import chain, pairwise
from typing import Any

import redis

from services.replay.extents import Extents, unpack_sample
from services.replay.keys import key_pattern
from services.replay.scripts import Scripts

NAMED = 5
"""Keys that one line of the report names."""


@dataclass(frozen=True)
class SampleKeys:
    """What the hash of one sample says."""

    state: str
    attempt: int
    num_bytes: int
    num_chunks: int
    stored_bytes: int = 0
    """Payload bytes for which room was made; in flight only."""
    num_uses: int = 0
    unacked: int = 0
    promise: int = 0


@dataclass(frozen=True)
class Snapshot:
    """Everything under a table's prefix that its counters count, at one moment."""

    counters: dict[str, str] = field(default_factory=dict)
    """The fields of `P:table`; empty if there is no table."""
    samples: dict[int, SampleKeys] = field(default_factory=dict)
    chunks: dict[tuple[int, int, int], int] = field(default_factory=dict)
    """(capture, attempt, index) → bytes."""
    extents: dict[int, Extents] = field(default_factory=dict)
    """Capture → where its chunks lie in the arena, if they do."""
    freed: Extents = ()
    """Extents that the arena's writer may give away again."""
    uses: dict[int, set[int]] = field(default_factory=dict)
    inserting: set[int] = field(default_factory=set)
    ready: set[int] = field(default_factory=set)
    weights: set[int] = field(default_factory=set)
    leases: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Lease id → (capture, k)."""
    deadlines: set[str] = field(default_factory=set)
    jobs: dict[int, int] = field(default_factory=dict)
    """Capture → attempt."""
    queue: set[int] = field(default_factory=set)
    taken: set[int] = field(default_factory=set)


def audit_table(client: redis.Redis, prefix: str) -> list[str]:
    """Check a table and its work queue, at work or at rest.

    Redis stands still for about a millisecond per thousand keys it holds.

    Args:
        client: From `connect`.
        prefix: The table's.

    Returns:
        What is wrong, a line each; empty if all is well.
    """
    return find_problems(read_snapshot(client, prefix))


def read_snapshot(client: redis.Redis, prefix: str) -> Snapshot:
    """Read what there is, in one transaction."""
    _, (text,) = Scripts(client, prefix).run("audit", key_pattern(prefix))
    found: dict[str, Any] = json.loads(text)
    leases = _pairs(found["leases"])
    samples = {int(capture): _sample(fields) for capture, fields, _ in found["samples"]}
    in_arena = {int(capture): unpack_sample(text) for capture, _, text in found["samples"] if text}
    chunks = {_chunk(name): num_bytes for name, num_bytes in found["chunks"]}
    for capture, places in in_arena.items():
        for index, extents in enumerate(places):
            chunks[capture, samples[capture].attempt, index] = sum(extent.num_bytes for extent in extents)
    return Snapshot(
        counters=_pairs(found["table"]),
        samples=samples,
        chunks=chunks,
        extents={capture: tuple(chain(*places)) for capture, places in in_arena.items()},
        freed=tuple(chain(*(extents for text in found["freed"] for extents in unpack_sample(text)))),
        uses={int(capture): _numbers(ks) for capture, ks in found["uses"]},
        inserting=_numbers(found["inserting"]),
        ready=_numbers(found["ready"]),
        weights=_numbers(found["weights"]),
        leases={name: (int(text.split()[0]), int(text.split()[1])) for name, text in leases.items()},
        deadlines=set(found["deadlines"]),
        jobs={int(capture): attempt for capture, attempt in found["jobs"]},
        queue=_numbers(found["queue"]),
        taken=_numbers(found["taken"]),
    )


def find_problems(snapshot: Snapshot) -> list[str]:
    """What contradicts the law above, a line each."""
    return [
        *_wrong_counters(snapshot),
        *_wrong_samples(snapshot),
        *_wrong_chunks(snapshot),
        *_wrong_extents(snapshot),
        *_wrong_leases(snapshot),
        *_wrong_jobs(snapshot),
    ]


def _wrong_counters(snapshot: Snapshot) -> Iterable[str]:
    if not snapshot.counters:
        if snapshot.samples or snapshot.chunks:
            yield f"there is no table, but {len(snapshot.samples)} samples and {len(snapshot.chunks)} chunks"
        return
    residents = _in_state(snapshot, "resident")
    in_flight = _in_state(snapshot, "inserting")
    counted = {
        "resident": sum(sample.num_bytes for sample in snapshot.samples.values()),
        "uses": sum(sample.num_uses for sample in residents.values()),
        "taken": sum(sample.num_uses - len(snapshot.uses.get(capture, ())) for capture, sample in residents.items()),
        "promised": sum(sample.promise for sample in residents.values()),
        "promising": sum(sample.promise for sample in in_flight.values()),
    }
    for name, number in counted.items():
        if int(snapshot.counters[name]) != number:
            yield f"{name} is counted as {snapshot.counters[name]}, the samples make it {number}"
    deletes = int(snapshot.counters["inserts"]) - len(residents)
    if int(snapshot.counters["deletes"]) != deletes:
        yield (
            f"{snapshot.counters['inserts']} inserts less {snapshot.counters['deletes']} deletes are not the "
            f"{len(residents)} samples that are here"
        )
    for name in ("resident", "peak"):
        if int(snapshot.counters[name]) > int(snapshot.counters["capacity"]):
            yield f"{name} bytes {snapshot.counters[name]} are above the capacity {snapshot.counters['capacity']}"


def _wrong_samples(snapshot: Snapshot) -> Iterable[str]:
    residents, in_flight = _in_state(snapshot, "resident"), _in_state(snapshot, "inserting")
    leased = Counter(capture for capture, _ in snapshot.leases.values())
    yield from _differ("captures in flight", snapshot.inserting, "their samples", in_flight)
    yield from _differ("samples that are ready", snapshot.ready, "samples with uses", snapshot.uses)
    yield from _differ("weighed samples", snapshot.weights, "ready ones", snapshot.ready)
    yield from _surplus("uses of no committed sample", snapshot.uses.keys() - residents.keys())
    for capture, sample in residents.items():
        left = len(snapshot.uses.get(capture, ())) + leased[capture]
        if sample.unacked != left:
            yield f"capture {capture} has {sample.unacked} uses to be acked, {left} are ready or leased"


def _wrong_chunks(snapshot: Snapshot) -> Iterable[str]:
    named = {
        (capture, sample.attempt, index)
        for capture, sample in snapshot.samples.items()
        for index in range(sample.num_chunks)
    }
    yield from _differ("chunks", snapshot.chunks.keys(), "those that samples name", named)
    for capture, sample in snapshot.samples.items():
        num_bytes = sum(snapshot.chunks.get((capture, sample.attempt, index), 0) for index in range(sample.num_chunks))
        if sample.state == "resident" and num_bytes != sample.num_bytes:
            yield f"capture {capture} is counted with {sample.num_bytes} bytes, its chunks have {num_bytes}"
        if sample.state == "inserting" and not num_bytes <= sample.stored_bytes <= sample.num_bytes:
            yield (
                f"capture {capture} in flight has {num_bytes} bytes in chunks, made room for {sample.stored_bytes} and "
                f"reserved {sample.num_bytes}"
            )


def _wrong_extents(snapshot: Snapshot) -> Iterable[str]:
    owned = [(extent, f"capture {capture}") for capture, extents in snapshot.extents.items() for extent in extents]
    owned += [(extent, "what was freed") for extent in snapshot.freed]
    owned.sort()
    for (first, owner), (second, other) in pairwise(owned):
        if second.start < first.end:
            yield f"bytes {second.start} to {min(first.end, second.end)} of the arena belong to {owner} and to {other}"


def _wrong_leases(snapshot: Snapshot) -> Iterable[str]:
    yield from _differ("leases", snapshot.leases.keys(), "deadlines", snapshot.deadlines)
    for use, count in Counter(snapshot.leases.values()).items():
        capture, k = use
        if count > 1 or k in snapshot.uses.get(capture, ()):
            yield f"use {k} of capture {capture} is leased {count} times, or ready as well"
    leased = {capture for capture, _ in snapshot.leases.values()}
    yield from _surplus("leases of samples that are not here", leased - _in_state(snapshot, "resident").keys())


def _wrong_jobs(snapshot: Snapshot) -> Iterable[str]:
    yield from _surplus("captures in flight without a job", snapshot.inserting - snapshot.jobs.keys())
    yield from _surplus("jobs neither waiting nor taken", snapshot.jobs.keys() - snapshot.queue - snapshot.taken)
    yield from _surplus("taken jobs that do not exist", snapshot.taken - snapshot.jobs.keys())
    for capture, sample in _in_state(snapshot, "inserting").items():
        attempt = snapshot.jobs.get(capture, sample.attempt)
        if attempt < sample.attempt:
            yield f"capture {capture} is in flight with attempt {sample.attempt}, its job has {attempt}"


def _in_state(snapshot: Snapshot, state: str) -> dict[int, SampleKeys]:
    return {capture: sample for capture, sample in snapshot.samples.items() if sample.state == state}


def _differ(what: str, found: Iterable[Any], other: str, wanted: Iterable[Any]) -> Iterable[str]:
    found, wanted = set(found), set(wanted)
    yield from _surplus(f"{what} that are not {other}", found - wanted)
    yield from _surplus(f"{other} that are not {what}", wanted - found)


def _surplus(what: str, found: Iterable[Any]) -> Iterable[str]:
    names = sorted(found)
    if names:
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        yield f"{what}: {', '.join(map(str, names[:NAMED]))}{more}"


def _pairs(flat: list[str] | dict[str, str]) -> dict[str, str]:
    # Lua's json library writes an empty array as an object.
    return dict(zip(flat[::2], flat[1::2], strict=True)) if isinstance(flat, list) else {}


def _numbers(values: Iterable[str]) -> set[int]:
    return {int(value) for value in values}


def _chunk(name: str) -> tuple[int, int, int]:
    capture, attempt, index = map(int, name.split(":"))
    return capture, attempt, index


def _sample(fields: list[str | bool]) -> SampleKeys:
    # False is a field that the hash does not have.
    state, *numbers = fields
    return SampleKeys(str(state), *(int(number or 0) for number in numbers))
