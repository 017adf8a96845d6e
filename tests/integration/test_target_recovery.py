"""Targets that die or lie in a run: real actors under a real pool, a real shard and Redis. Prints how long it takes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from waiting import WAIT_S, wait_until

from services.contracts import CaptureJob, Chunk, TableSignature
from services.models import read_shape
from services.replay.audit import audit_table
from services.replay.config import ReplayConfig
from services.replay.connect import Client, connect
from services.replay.embedded import EmbeddedRedis
from services.replay.registry import TargetRegistry
from services.replay.shard import ReplayShard
from services.replay.table import RedisTable
from services.replay.work import WorkQueue
from services.target import pool as pool_module
from services.target import replica as replica_module
from services.target.client import TargetClient
from services.target.config import TargetConfig
from services.target.pool import TargetPool

PREFIX = "run"
TOKENS = 48
LOAD_S = 300.0


@pytest.fixture(autouse=True)
def no_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    """A target that a busy machine keeps from answering for a while is not gone."""
    monkeypatch.setattr(pool_module, "SILENCE_S", LOAD_S)


@pytest.fixture(scope="module")
def own_ray() -> Iterator[None]:
    """A cluster of this file's own: its tests kill actors."""
    import ray

    from trainer.cluster import start_local_ray

    start_local_ray(
        num_cpus=1,
        num_gpus=0,
        object_store_memory=80 * 1024**2,
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=64,
    )
    path = tmp_path_factory.mktemp("target")
    Qwen3ForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedRedis]:
    with EmbeddedRedis.start(tmp_path_factory.mktemp("redis"), 10_000_000) as running:
        yield running


@pytest.fixture
def client(embedded: EmbeddedRedis) -> Iterator[Client]:
    client = connect(embedded.url)
    yield client
    client.flushdb()


class LyingClient(TargetClient):
    """Flips a bit of everything that comes from the addresses it is told of."""

    liars: set[str] = set()  # noqa: RUF012

    def capture(self, job: CaptureJob, **options: Any) -> Iterator[tuple[Chunk, memoryview]]:
        for chunk, payload in super().capture(job, **options):
            if self.address in self.liars:
                payload = memoryview(bytes([payload[0] ^ 1]) + bytes(payload[1:]))
            yield chunk, payload


class Run:
    """A pool of targets, a shard at work, and a trainer that takes whatever is ready and keeps the time."""

    def __init__(self, url: str, client: Client, folder: Path, replicas: int) -> None:
        self.client = client
        self.table, self.work = RedisTable(client, PREFIX), WorkQueue(client, PREFIX)
        self.registry = TargetRegistry(client, PREFIX)
        fingerprint = read_shape(folder).fingerprint
        signature = TableSignature(fingerprint=fingerprint, layer_ids=(0, 2), hidden_size=16, dtype="bf16")
        config = ReplayConfig.model_validate({"capacity": "1MB", "chunk": 1024, "pulls": 4, "lease_s": 300.0})
        self.shard = ReplayShard(url, PREFIX, config, signature, connect_target=LyingClient)
        target = TargetConfig(model=str(folder), dtype="float32", num_gpus=0, threads=1, replicas=replicas)
        self.pool = TargetPool(target, lambda addresses: self.registry.publish(addresses, time.time()))
        self.moments: list[tuple[float, str]] = []
        self.num_pushed = 0
        self.stop = threading.Event()

    @contextmanager
    def running(self) -> Iterator[None]:
        threads = [threading.Thread(target=part) for part in (self.shard.run, self.feed_and_train)]
        self.pool.start()
        try:
            self.pool.wait_ready(LOAD_S)
            for thread in threads:
                thread.start()
            yield
        finally:
            self.stop.set()
            self.shard.stop()
            for thread in threads:
                thread.join(WAIT_S)
            self.pool.stop()
        assert not any(thread.is_alive() for thread in threads)

    def feed_and_train(self) -> None:
        while not self.stop.wait(0.01):
            for _ in range(16 - self.work.size()):
                self.work.push(make_job(self.num_pushed))
                self.num_pushed += 1
            now_s = time.time()
            if self.table.incarnation() is None:
                continue
            while leases := self.table.lease(rank=0, generation=0, count=1, now_s=now_s, lease_s=WAIT_S):
                self.moments.append((time.monotonic(), leases[0].sample.target))
                self.table.ack(leases, 0, now_s)

    def captured_since(self, moment_s: float, target: str | None = None) -> list[float]:
        return [at_s for at_s, by in list(self.moments) if at_s > moment_s and target in (None, by)]

    def wait_for_captures(self, count: int, *, target: str | None = None) -> None:
        since_s = time.monotonic()
        wait_until(lambda: len(self.captured_since(since_s, target)) >= count, f"{count} captures")

    def check_nothing_lost(self) -> None:
        """Every capture that was pushed is committed once, in the queue, or in flight; nothing failed."""
        outcomes = self.table.drain_outcomes()
        assert {outcome.kind for outcome in outcomes} == {"committed"}
        assert len({outcome.capture for outcome in outcomes}) == len(outcomes)
        assert audit_table(self.client, PREFIX) == []


def make_job(capture: int) -> CaptureJob:
    ids = tuple((capture + place) % 50 for place in range(TOKENS))
    return CaptureJob(capture=capture, prompt=0, epoch=0, input_ids=ids, loss_mask=(1,) * TOKENS, last_rows=(0, 1))


def process_at(address: str) -> psutil.Process:
    port = int(address.rpartition(":")[2])
    (pid,) = {
        connection.pid
        for connection in psutil.net_connections("tcp")
        if connection.laddr.port == port and connection.status == psutil.CONN_LISTEN
    }
    return psutil.Process(pid)


def measured(condition: Callable[[], object], what: str, since_s: float) -> float:
    """Seconds from a moment until a condition holds."""
    wait_until(condition, what, WAIT_S + LOAD_S)
    return time.monotonic() - since_s


@pytest.mark.usefixtures("own_ray")
def test_only_target_killed_in_mid_stream_is_back_at_once_after_it_loaded(
    embedded: EmbeddedRedis, client: Client, folder: Path
) -> None:
    run = Run(embedded.url, client, folder, replicas=1)
    with run.running():
        run.wait_for_captures(20)
        (address,) = run.pool.addresses()
        process_at(address).kill()
        killed_s = time.monotonic()
        unpublished_s = measured(lambda: address not in run.pool.addresses(), "the loss of the target", killed_s)
        # All of it Ray's and the model's: a process, its imports, the weights.
        load_s = measured(lambda: run.pool.states()[0].state == "serving", "the restart", killed_s)
        first_s = measured(lambda: run.captured_since(killed_s + load_s), "a capture", killed_s)
        (reborn,) = run.pool.addresses()
        assert reborn != address
        run.wait_for_captures(20, target=reborn)
        targets = [by for _, by in run.moments]
        assert set(targets[targets.index(reborn) :]) == {reborn}
        print(
            f"noticed {unpublished_s:.2f} s after the kill, serving after {load_s:.2f} s, "
            f"first capture {first_s - load_s:.2f} s later"
        )
        assert [event.kind for event in run.pool.events()] == ["gone", "restart"]
    run.check_nothing_lost()


@pytest.mark.usefixtures("own_ray")
def test_one_of_two_targets_killed_leaves_the_other_at_work(
    embedded: EmbeddedRedis, client: Client, folder: Path
) -> None:
    run = Run(embedded.url, client, folder, replicas=2)
    with run.running():
        dying, living = run.pool.addresses()
        for address in (dying, living):
            run.wait_for_captures(10, target=address)
        began_s = time.monotonic()
        run.wait_for_captures(100)
        rate_before = len(run.captured_since(began_s)) / (time.monotonic() - began_s)
        process_at(dying).kill()
        killed_s = time.monotonic()
        wait_until(lambda: dying not in run.pool.addresses(), "the loss of the target")
        lost_s = time.monotonic()
        wait_until(lambda: len(run.pool.addresses()) == 2, "the restart", LOAD_S)
        (reborn,) = set(run.pool.addresses()) - {living}
        served_s = time.monotonic()
        run.wait_for_captures(10, target=reborn)
        moments = [killed_s, *run.captured_since(killed_s)]
        longest_gap_s = max(after - before for before, after in pairwise(moments))
        alone = [at_s for at_s in moments if at_s < served_s]
        back_s = run.captured_since(killed_s, reborn)[0] - served_s
        print(
            f"{rate_before:.0f} captures/s before the kill, {len(alone) / (served_s - killed_s):.0f} by the other one "
            f"alone for {served_s - killed_s:.1f} s, longest gap {longest_gap_s:.2f} s, both {back_s:.2f} s after that"
        )
        assert [at_s for at_s in run.captured_since(lost_s, living) if at_s < served_s], "the other one was at work"
    run.check_nothing_lost()


@pytest.mark.usefixtures("own_ray")
def test_target_that_lies_is_restarted_and_serves_again(
    embedded: EmbeddedRedis, client: Client, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LyingClient, "liars", liars := set[str]())
    run = Run(embedded.url, client, folder, replicas=2)
    with run.running():
        wrong, well = run.pool.addresses()
        for address in (wrong, well):
            run.wait_for_captures(10, target=address)
        liars.add(wrong)
        seen: list[str] = []

        def is_replaced() -> bool:
            state = run.pool.states()[0]
            if state.state != "serving" and state.state not in seen:
                seen.append(state.state)
                assert "checksum" in state.message
            return state.state == "serving" and state.address != wrong

        wait_until(is_replaced, "the restart", LOAD_S)
        assert set(seen) <= {"quarantined"}
        reborn = run.pool.states()[0].address
        run.wait_for_captures(10, target=reborn)
        events = run.pool.events()
        assert [event.kind for event in events] == ["quarantined", "restart"]
        assert (
            f"target 0 at {wrong} answers wrongly and is restarted: it broke the protocol 2 times" in events[0].message
        )
        assert {by for _, by in run.moments} == {wrong, well, reborn}
    run.check_nothing_lost()


@pytest.mark.usefixtures("own_ray")
def test_target_that_goes_on_lying_has_failed_and_the_run_hears_why(
    embedded: EmbeddedRedis, client: Client, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (pool_module, replica_module):
        monkeypatch.setattr(module, "MOST_QUARANTINES", 1)
    run = Run(embedded.url, client, folder, replicas=2)
    with run.running():
        _, well = run.pool.addresses()

        class AllButOne(set[str]):
            def __contains__(self, address: object) -> bool:
                return address != well

        monkeypatch.setattr(LyingClient, "liars", AllButOne())
        wait_until(lambda: run.pool.states()[0].state == "failed", "the end of the target", LOAD_S)
        state = run.pool.states()[0]
        assert "it answered wrongly again after 1 restarts within 30 minutes" in state.message
        assert "checksum" in state.message
        assert [event.kind for event in run.pool.events()] == ["quarantined", "restart", "failed"]
        run.pool.check()  # the other one serves
        run.wait_for_captures(20, target=well)
    run.check_nothing_lost()
