"""Each contract test of a replay table runs on a real Redis, its payloads there or in shared memory, and in memory."""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Callable, Iterator

import pytest
from replaying import JOB_BYTES, SIGNATURE, MakeReplay, Replay

from services.replay.arena import Arena
from services.replay.arena_store import ArenaStore
from services.replay.connect import Client, connect
from services.replay.embedded import EmbeddedRedis
from services.replay.memory_table import MemoryStore, MemoryTable, MemoryWorkQueue
from services.replay.protocol import CaptureQueue, ReplayTable
from services.replay.table import RedisTable
from services.replay.work import WorkQueue

ARENA_BYTES = 1_000_000
"""At least the capacity of any table that these tests make."""


@pytest.fixture(scope="session")
def redis_client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    with EmbeddedRedis.start(tmp_path_factory.mktemp("redis"), 1_000_000) as embedded:
        yield connect(embedded.url)


@pytest.fixture(params=["memory", "redis", "shm"])
def make_replay(request: pytest.FixtureRequest) -> Iterator[MakeReplay]:
    """Makes tables that are not created yet. The first is called `run`."""
    made: list[Replay] = []
    names = itertools.chain(["run"], (f"run{number}" for number in itertools.count(1)))
    prefixes: list[str] = []

    def make(seed: int = 0, draw: Callable[[], float] | None = None) -> Replay:
        draw, prefix = draw or random.Random(seed).random, next(names)
        prefixes.append(prefix)
        if request.param == "memory":
            memory = MemoryStore(prefix)
            made.append(Replay(MemoryTable(memory, draw=draw), MemoryWorkQueue(memory)))
        else:
            client = request.getfixturevalue("redis_client")
            chunks = None
            if request.param == "shm":
                chunks = ArenaStore(client, prefix, stack.enter_context(Arena(ARENA_BYTES)).place)
                stack.callback(chunks.close)
            made.append(Replay(RedisTable(client, prefix, chunks=chunks, draw=draw), WorkQueue(client, prefix)))
        return made[-1]

    with contextlib.ExitStack() as stack:
        yield make
        for replay in made:
            replay.table.destroy()
    if request.param != "memory":
        client = request.getfixturevalue("redis_client")
        assert [key for prefix in prefixes for key in client.keys(f"{prefix}:*")] == []


@pytest.fixture
def replay(make_replay: MakeReplay) -> Iterator[Replay]:
    """Room for 4 samples of `JOB_BYTES`, one use each."""
    replay = make_replay()
    replay.table.create(4 * JOB_BYTES, SIGNATURE, max_times_sampled=1)
    yield replay
    assert replay.table.info().peak_bytes <= 4 * JOB_BYTES


@pytest.fixture
def table(replay: Replay) -> ReplayTable:
    return replay.table


@pytest.fixture
def work(replay: Replay) -> CaptureQueue:
    return replay.work
