"""A shard that dies anywhere costs no capture, no byte and no use: the next one on the same Redis goes on."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from waiting import wait_until

from services.checksum import crc32c
from services.contracts import CaptureJob, Chunk, TableSignature, TargetDescription, WireDtype
from services.errors import FeatureError
from services.replay import shard as shard_module
from services.replay.audit import audit_table
from services.replay.config import ReplayConfig
from services.replay.connect import Client, connect
from services.replay.embedded import EmbeddedRedis
from services.replay.keys import key_pattern
from services.replay.raw_connection import RawConnection
from services.replay.reader import ReplayReader
from services.replay.registry import TargetRegistry
from services.replay.shard import ReplayShard
from services.replay.table import RedisTable
from services.replay.work import WorkQueue

SIGNATURE = TableSignature(fingerprint="f", layer_ids=(0, 2), hidden_size=4, dtype="bf16")
PREFIX = "run"
REUSE = 2
LONGEST = 40
CAPACITY_BYTES = 6 * LONGEST * (SIGNATURE.context_row_bytes + SIGNATURE.last_row_bytes)
CONFIG = ReplayConfig.model_validate(
    {"capacity": CAPACITY_BYTES, "chunk": 128, "pulls": 4, "reuse": REUSE, "lease_s": 600.0}
)

NUM_CAPTURES = 300
NUM_KILLS = 12
STUCK_EVERY = 6
"""Of so many captures one sticks in its first attempt until its shard is killed. All pulls do after a while, and a kill
frees one capture a pull: the captures outlast the kills, however late those come."""

WAIT_S = 120.0


def make_job(capture: int) -> CaptureJob:
    tokens = 3 + 7 * capture % (LONGEST - 2)
    return CaptureJob(
        capture=capture,
        prompt=capture,
        epoch=0,
        reuse=REUSE,
        input_ids=tuple(range(capture, capture + tokens)),
        loss_mask=(1,) * tokens,
        last_rows=tuple(range(tokens - 1)),
    )


def features(job: CaptureJob) -> tuple[torch.Tensor, torch.Tensor]:
    """context [T, 8] and last [R, 4], different for each capture."""
    context = torch.arange(job.num_tokens * 8).reshape(-1, 8) + 1000 * job.capture
    last = torch.arange(len(job.last_rows) * 4).reshape(-1, 4) - 1000 * job.capture
    return context.to(torch.bfloat16), last.to(torch.bfloat16)


class SyntheticTarget:
    """Gives features as fast as they are taken, but for a moment between chunks in which a kill can come."""

    pause_s = 0.002
    sticks = False

    def describe(self, timeout_s: float) -> TargetDescription:
        return TargetDescription(
            model_name="synthetic",
            fingerprint="f",
            num_layers=4,
            hidden_size=4,
            vocab_size=10_000,
            dtype="bfloat16",
            max_tokens=100,
            engine="synthetic",
        )

    def capture(
        self,
        job: CaptureJob,
        *,
        layer_ids: Sequence[int],
        wire_dtype: WireDtype,
        chunk_bytes: int,
        timeout_s: float,
        first_chunk_s: float,
        progress_s: float,
        on_answer: Callable[[Sequence[int]], None] | None = None,
    ) -> Iterator[tuple[Chunk, memoryview]]:
        for tensor, rows in zip(("context", "last"), features(job), strict=True):
            row_bytes = rows.shape[1] * rows.element_size()
            data, step = rows.view(torch.uint8).numpy().tobytes(), max(1, chunk_bytes // row_bytes)
            for start in range(0, len(rows), step):
                time.sleep(self.pause_s)
                if self.sticks and job.attempt == 0 and job.capture % STUCK_EVERY == STUCK_EVERY - 1:
                    threading.Event().wait()
                end = min(start + step, len(rows))
                payload = data[start * row_bytes : end * row_bytes]
                chunk = {"tensor": tensor, "row_start": start, "row_end": end, "num_bytes": len(payload)}
                yield Chunk.model_validate({**chunk, "crc32c": crc32c(payload)}), memoryview(payload)

    def close(self) -> None:
        pass


class StickingTarget(SyntheticTarget):
    """Gives some captures to the next shard alone."""

    sticks = True


def run_shard(url: str, target: type[SyntheticTarget]) -> None:
    """Entry of a shard's own process."""
    ReplayShard(url, PREFIX, CONFIG, SIGNATURE, connect_target=lambda address: target()).run()


@pytest.fixture
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedRedis]:
    with EmbeddedRedis.start(tmp_path_factory.mktemp("redis"), CAPACITY_BYTES) as running:
        yield running


class Trainer(threading.Thread):
    """Leases samples one by one, holds each against what the target gave, and acks it or gives it back."""

    def __init__(self, url: str, seed: int) -> None:
        super().__init__(daemon=True)
        self.reader = ReplayReader(url, PREFIX, SIGNATURE)
        self.random = random.Random(seed)
        self.trained: Counter[int] = Counter()
        self.failure: BaseException | None = None

    def run(self) -> None:
        try:
            while sum(self.trained.values()) < NUM_CAPTURES * REUSE:
                (lease,) = self.reader.lease(rank=0, generation=0, count=1, lease_s=600.0, timeout_s=WAIT_S)
                sample = self.reader.fetch(lease)
                wanted = features(lease.sample.job)
                assert torch.equal(sample.context, wanted[0])
                assert torch.equal(sample.last, wanted[1])
                if self.random.random() < 0.1:
                    self.reader.release([lease], 0)
                else:
                    self.reader.ack([lease], 0)
                    self.trained[lease.use] += 1
        except BaseException as error:
            self.failure = error


def test_shard_killed_again_and_again_captures_all_once_and_leaks_nothing(embedded: EmbeddedRedis) -> None:
    seed = int.from_bytes(os.urandom(4))
    print(f"seed {seed}")
    chance = random.Random(seed)
    client = connect(embedded.url)
    table, work = RedisTable(client, PREFIX), WorkQueue(client, PREFIX)
    TargetRegistry(client, PREFIX).publish(["synthetic:1"], time.time() + 1e6)
    for capture in range(NUM_CAPTURES):
        work.push(make_job(capture))
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["services.replay.shard", "torch"])

    def start(target: type[SyntheticTarget]) -> Any:
        process = processes.Process(target=run_shard, args=(embedded.url, target), daemon=True)
        process.start()
        return process

    shard = start(StickingTarget)
    trainer = Trainer(embedded.url, seed)
    wait_until(lambda: table.incarnation() is not None, "a table")
    trainer.start()
    before = kills = interrupted = 0
    try:
        while kills < NUM_KILLS and trainer.is_alive():
            wait_until(lambda: table.info().inserts > before, "a capture after the restart")  # noqa: B023
            time.sleep(chance.uniform(0.0, 0.08))
            assert audit_table(client, PREFIX) == [], "at work"
            os.kill(shard.pid, signal.SIGKILL)
            shard.join(WAIT_S)
            kills += 1
            interrupted += table.info().num_inserting
            assert audit_table(client, PREFIX) == [], "after the kill"
            before = table.info().inserts
            shard = start(StickingTarget if kills < NUM_KILLS else SyntheticTarget)
        trainer.join(2 * WAIT_S)
        wait_until(lambda: table.info().num_inserting == 0, "the end of the captures")
    finally:
        shard.kill()
        shard.join(WAIT_S)
    if trainer.failure is not None:
        raise trainer.failure
    assert not trainer.is_alive(), f"only {sum(trainer.trained.values())} uses were trained"
    assert kills == NUM_KILLS
    assert interrupted > 0, "no kill met a capture in flight"
    outcomes = Counter((outcome.capture, outcome.kind) for outcome in table.drain_outcomes())
    assert outcomes == {(capture, "committed"): 1 for capture in range(NUM_CAPTURES)}
    assert trainer.trained == dict.fromkeys(range(NUM_CAPTURES * REUSE), 1)
    assert audit_table(client, PREFIX) == []
    info = table.info()
    assert (info.resident_bytes, info.num_leased, work.size()) == (0, 0, 0)
    assert 0 < info.peak_bytes <= CAPACITY_BYTES
    assert (info.inserts, info.deletes) == (NUM_CAPTURES, NUM_CAPTURES)
    keys = [key.decode().removeprefix(f"{PREFIX}:") for key in client.scan_iter(match=key_pattern(PREFIX))]
    kinds = {key.partition(":")[0] for key in keys}
    assert kinds <= {"table", "targets", "telemetry"}


PLAIN_SEND = RawConnection.send


class Killed(BaseException):
    """Nothing of the shard runs after this, as after SIGKILL."""


class CutOff:
    """Lets the commands of dispatcher and pulls through until it has counted to a number; then they are dead.

    Odd numbers die after the command was carried out, and before its answer came; of what a chunk is sent with, half
    has left by then.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self.count = 0
        self.lock = threading.Lock()

    def connect(self, url: str) -> Client:
        client = connect(url)
        plain = client.execute_command

        def execute(*args: Any, **options: Any) -> Any:
            if threading.current_thread().name == "telemetry":
                return plain(*args, **options)
            return self.cut(lambda: plain(*args, **options), lambda: plain(*args, **options))

        client.execute_command = execute  # type: ignore[method-assign]
        return client

    def send(self, connection: RawConnection, pieces: Sequence[bytes | memoryview], num_replies: int) -> None:
        """In place of `RawConnection.send`."""
        sent = b"".join(pieces)
        half = sent[: len(sent) // 2]
        self.cut(lambda: PLAIN_SEND(connection, pieces, num_replies), lambda: PLAIN_SEND(connection, [half], 1))

    def cut(self, whole: Callable[[], Any], last: Callable[[], Any]) -> Any:
        with self.lock:
            self.count += 1
            count = self.count
        if count <= self.number // 2:
            return whole()
        if count == self.number // 2 + 1 and self.number % 2:
            last()
        raise Killed


class StumblingTarget(SyntheticTarget):
    """Gives NaN for the first attempt of each capture, so that every capture has a second one."""

    pause_s = 0.0

    def capture(self, job: CaptureJob, **options: Any) -> Iterator[tuple[Chunk, memoryview]]:
        for index, item in enumerate(super().capture(job, **options)):
            if job.attempt == 0 and index == 1:
                raise FeatureError("NaN")
            yield item


def test_shard_that_dies_at_any_command_leaves_nothing_that_the_next_one_cannot_take_over(
    embedded: EmbeddedRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_module, "SHUN_S", 0.0)
    client = connect(embedded.url)
    number, deaths = 1, 0
    while True:
        client.flushdb()
        table, work = RedisTable(client, PREFIX), WorkQueue(client, PREFIX)
        TargetRegistry(client, PREFIX).publish(["a"], time.time() + 1e6)
        for capture in (0, 1):
            work.push(make_job(capture))
        is_killed = run_until_killed_or_done(embedded.url, CutOff(number), table, monkeypatch)
        deaths += is_killed
        assert [line for line in audit_table(client, PREFIX) if not line.startswith("there is no table")] == []
        if not is_killed:
            break
        assert not run_until_killed_or_done(embedded.url, CutOff(10**9), table, monkeypatch)
        outcomes = Counter((outcome.capture, outcome.kind) for outcome in table.drain_outcomes())
        assert outcomes == {(0, "committed"): 1, (1, "committed"): 1}, f"after a death at {number}"
        assert audit_table(client, PREFIX) == []
        assert table.info().resident_bytes == sum(SIGNATURE.reserved_bytes(make_job(capture)) for capture in (0, 1))
        number += 1
    assert deaths > 60, "a capture takes more commands than that"


def run_until_killed_or_done(url: str, cut_off: CutOff, table: RedisTable, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Run a shard; whether it was killed before both captures were made."""
    deaths: list[Killed] = []
    shards: list[ReplayShard] = []

    def run() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(shard_module, "connect", cut_off.connect)
            patch.setattr(RawConnection, "send", lambda *args: cut_off.send(*args))
            try:
                shards.append(
                    ReplayShard(url, PREFIX, CONFIG, SIGNATURE, connect_target=lambda address: StumblingTarget())
                )
                shards[0].run()
            except Killed as death:
                deaths.append(death)

    thread = threading.Thread(target=run)
    thread.start()
    wait_until(lambda: not thread.is_alive() or is_done(table), "the end of the shard, or of its work")
    if shards:
        shards[0].stop()
    thread.join(WAIT_S)
    assert not thread.is_alive(), "the shard did not stop"
    return bool(deaths) and not is_done(table)


def is_done(table: RedisTable) -> bool:
    return table.incarnation() is not None and table.info().inserts == 2
