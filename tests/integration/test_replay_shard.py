"""The shard from work queue to tensors: fake targets for faults, a real gRPC target for the bytes."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from replaying import put_chunk
from waiting import wait_until

from services.answers import AnswerBook
from services.checksum import crc32c
from services.contracts import (
    CaptureJob,
    Chunk,
    Generation,
    LastRows,
    Sample,
    SampleLease,
    TableSignature,
    TargetDescription,
    WireDtype,
)
from services.errors import (
    CaptureRequestError,
    DeadlineError,
    ReplayUnavailableError,
    SignatureError,
    TargetUnavailableError,
    UnknownSampleError,
    WireError,
)
from services.replay import shard as shard_module
from services.replay.config import ReplayConfig
from services.replay.connect import Client, connect
from services.replay.embedded import EmbeddedRedis
from services.replay.reader import ReplayReader
from services.replay.registry import TargetRegistry
from services.replay.shard import ReplayShard
from services.replay.table import RedisTable
from services.replay.targets import CaptureClient
from services.replay.work import WorkQueue
from services.telemetry import TelemetryReader

SIGNATURE = TableSignature(fingerprint="f", layer_ids=(0, 2), hidden_size=4, dtype="bf16")
"""16 bytes a context row, 8 bytes a last row."""

PREFIX = "run"
TOKENS = 5
JOB_BYTES = TOKENS * 16 + 2 * 8
WAIT_S = 120.0
LEASE_S = 600.0
"""No lease ends while a test lasts, and no target that is real is found too slow."""


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedRedis]:
    with EmbeddedRedis.start(tmp_path_factory.mktemp("redis"), 10_000_000) as running:
        yield running


@pytest.fixture
def client(embedded: EmbeddedRedis) -> Iterator[Client]:
    client = connect(embedded.url)
    yield client
    client.flushdb()


def make_job(capture: int, *, reuse: int = 1, tokens: int = TOKENS) -> CaptureJob:
    return CaptureJob(
        capture=capture,
        prompt=capture,
        epoch=0,
        reuse=reuse,
        input_ids=tuple(range(capture, capture + tokens)),
        loss_mask=(0,) * (tokens - 3) + (1, 1, 1),
        last_rows=(tokens - 3, tokens - 2),
    )


def features(job: CaptureJob) -> tuple[torch.Tensor, torch.Tensor]:
    """What the fake target answers: context [T, 8] and last rows [2, 4], different for each capture."""
    context = torch.arange(job.num_tokens * 8).reshape(-1, 8) + 1000 * job.capture
    last = torch.arange(2 * 4).reshape(2, 4) - 1000 * job.capture
    return context.to(torch.bfloat16), last.to(torch.bfloat16)


class FakeTarget:
    """One target process. `fault` is called before each chunk with the job and the chunk's index."""

    def __init__(self, *, fingerprint: str = "f", fault: Callable[[CaptureJob, int], None] | None = None) -> None:
        self.fingerprint = fingerprint
        self.fault = fault
        self.asked: list[tuple[int, int]] = []
        self.num_open = 0
        self.answer = (7, 8, 9)
        self.lock = threading.Lock()

    def connect(self) -> CaptureClient:
        return FakeClient(self)


class FakeClient:
    def __init__(self, target: FakeTarget) -> None:
        self.target = target
        self.is_closed = False

    def describe(self, timeout_s: float) -> TargetDescription:
        return TargetDescription(
            model_name="fake",
            fingerprint=self.target.fingerprint,
            num_layers=4,
            hidden_size=4,
            vocab_size=100,
            dtype="bfloat16",
            max_tokens=100,
            engine="fake",
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
        assert (tuple(layer_ids), wire_dtype) == ((0, 2), "bf16")
        with self.target.lock:
            self.target.asked.append((job.capture, job.attempt))
        if job.generate is not None:
            assert on_answer is not None
            on_answer(self.target.answer)
            job = job.answered(self.target.answer)
        context, last = (tensor.view(torch.uint8).numpy().tobytes() for tensor in features(job))
        rows = chunk_bytes // 16
        pieces = [
            ("context", row, min(row + rows, job.num_tokens), context, 16) for row in range(0, job.num_tokens, rows)
        ]
        pieces.append(("last", 0, 2, last, 8))
        for index, (tensor, start, end, data, row_bytes) in enumerate(pieces):
            if self.target.fault is not None:
                self.target.fault(job, index)
            if self.is_closed:
                raise TargetUnavailableError("the client was closed")
            payload = data[start * row_bytes : end * row_bytes]
            chunk = Chunk(tensor=tensor, row_start=start, row_end=end, num_bytes=len(payload), crc32c=crc32c(payload))
            yield chunk, memoryview(payload)

    def close(self) -> None:
        self.is_closed = True


class Setup:
    """A shard with its queue, targets and reader; `running` runs it in a thread."""

    def __init__(
        self,
        embedded: EmbeddedRedis,
        client: Client,
        targets: dict[str, FakeTarget],
        answers: Path | None = None,
        **config: object,
    ) -> None:
        settings = {"capacity": 4 * JOB_BYTES, "chunk": 64, "pulls": 3, "lease_s": LEASE_S, **config}
        self.config = ReplayConfig.model_validate(settings)
        self.targets = targets
        self.answers = answers
        self.url = embedded.url
        self.work = WorkQueue(client, PREFIX)
        self.table = RedisTable(client, PREFIX)
        self.registry = TargetRegistry(client, PREFIX)
        self.reader = ReplayReader(embedded.url, PREFIX, SIGNATURE)
        self.telemetry = TelemetryReader(client, PREFIX)
        self.registry.publish(list(targets), time.time() + 1000)
        self.shard = self.new_shard()

    def new_shard(self) -> ReplayShard:
        return ReplayShard(
            self.url,
            PREFIX,
            self.config,
            SIGNATURE,
            self.answers,
            connect_target=lambda address: self.targets[address].connect(),
        )

    @contextmanager
    def running(self) -> Iterator[None]:
        failures: list[BaseException] = []

        def run() -> None:
            try:
                self.shard.run()
            except BaseException as error:
                failures.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield
        finally:
            self.shard.stop()
            thread.join(WAIT_S)
            assert not thread.is_alive(), "the shard did not stop"
        if failures:
            raise failures[0]

    def lease(self, count: int = 1, **options: object) -> list[SampleLease]:
        return self.reader.lease(
            rank=0,
            generation=0,
            count=count,
            lease_s=LEASE_S,
            **{"timeout_s": WAIT_S, **options},  # type: ignore[arg-type]
        )

    def outcomes(self, count: int) -> list[tuple[int, int, str]]:
        """The next outcomes, waiting until there are so many."""
        found: list[tuple[int, int, str]] = []
        self.reasons: list[str] = []

        def drain() -> bool:
            for outcome in self.table.drain_outcomes():
                found.append((outcome.capture, outcome.attempt, outcome.kind))
                self.reasons.append(outcome.reason)
            return len(found) >= count

        wait_until(drain, f"{count} outcomes")
        return sorted(found)

    def events(self) -> list[dict[str, Any]]:
        """What the shard has told since the last look, waiting until it is there: a shard that ends waits less."""
        found: list[dict[str, Any]] = []
        wait_until(lambda: found.extend(self.telemetry.read()) or found, "an event")
        return found


def test_sample_arrives_as_it_left_the_target(embedded: EmbeddedRedis, client: Client) -> None:
    setup = Setup(embedded, client, {"a": FakeTarget()})
    with setup.running():
        setup.work.push(make_job(3))
        (lease,) = setup.lease()
        sample = setup.reader.fetch(lease)
        assert setup.outcomes(1) == [(3, 0, "committed")]
        setup.reader.ack([lease], 0)
        with pytest.raises(UnknownSampleError, match="chunk 0 of capture 3 is not in the replay buffer"):
            setup.reader.fetch(lease)
    context, last = features(make_job(3))
    assert torch.equal(sample.context, context)
    assert torch.equal(sample.last, last)
    assert (sample.context.dtype, sample.last.dtype) == (torch.bfloat16, torch.bfloat16)
    assert sample.input_ids.tolist() == [3, 4, 5, 6, 7]
    assert sample.loss_mask.tolist() == [0, 0, 1, 1, 1]
    assert sample.last_rows.tolist() == [2, 3]
    assert lease.sample.target == "a"
    assert [(chunk.tensor, chunk.row_start, chunk.row_end) for chunk in lease.sample.chunks] == [
        *(("context", 0, 4), ("context", 4, 5), ("last", 0, 2)),
    ]
    stats = setup.shard.stats()
    assert (stats.num_captured, stats.num_tokens, stats.num_bytes, stats.num_in_flight) == (1, 5, JOB_BYTES, 0)
    assert setup.table.info().resident_bytes == 0


def test_full_buffer_waits_and_loses_nothing(embedded: EmbeddedRedis, client: Client) -> None:
    both_at_work = threading.Barrier(2)

    def wait_for_the_other(job: CaptureJob, index: int) -> None:
        if job.capture < 2 and index == 0:
            both_at_work.wait(WAIT_S)

    targets = {address: FakeTarget(fault=wait_for_the_other) for address in "ab"}
    setup = Setup(embedded, client, targets, reuse=2)
    setup.table.create(setup.config.capacity, SIGNATURE, 2)
    for capture in range(30):
        setup.work.push(make_job(capture, reuse=2))
    seen: list[int] = []
    with setup.running():
        wait_until(lambda: setup.table.info().num_ready == 4, "a full buffer")
        wait_until(lambda: setup.work.size() == 25, "a job at the head of the line")
        while len(seen) < 60:
            leases = setup.lease(2)
            for lease in leases:
                sample = setup.reader.fetch(lease)
                assert torch.equal(sample.context, features(lease.sample.job)[0])
            setup.reader.ack(leases, 0)
            seen += [lease.use for lease in leases]
    info = setup.table.info()
    assert sorted(seen) == list(range(60))
    assert info.peak_bytes == 4 * JOB_BYTES == info.capacity_bytes
    assert (info.resident_bytes, info.inserts, info.samples, info.deletes) == (0, 30, 60, 30)
    assert setup.shard.stats().full_wait_s > 0
    assert {target.asked[0][1] for target in targets.values()} == {0}  # both had work
    assert client.keys("run:chunk:*") == []


def test_named_captures_are_waited_for_in_plan_order(embedded: EmbeddedRedis, client: Client) -> None:
    """Later captures can never fill the buffer while the head of the line waits."""
    setup = Setup(embedded, client, {"a": FakeTarget()}, pulls=8)
    for capture in range(20):
        setup.work.push(make_job(capture))
    with setup.running():
        for first in range(0, 20, 2):
            leases = setup.lease(captures=[first + 1, first])
            assert [lease.sample.job.capture for lease in leases] == [first + 1, first]
            setup.reader.ack(leases, 0)


def test_dead_target_mid_stream_costs_an_attempt_and_keeps_its_space(embedded: EmbeddedRedis, client: Client) -> None:
    """The buffer is full of captures in flight: one that had to be admitted again would wait for ever."""
    entered, die = threading.Semaphore(0), threading.Event()

    def dies(job: CaptureJob, index: int) -> None:
        if index == 1:
            entered.release()
            assert die.wait(WAIT_S)
            raise TargetUnavailableError("connection reset")

    dead, alive = FakeTarget(fault=dies), FakeTarget()
    setup = Setup(embedded, client, {"dead": dead}, pulls=4)
    setup.targets["alive"] = alive
    for capture in range(6):
        setup.work.push(make_job(capture))
    with setup.running():
        for _ in range(4):
            assert entered.acquire(timeout=WAIT_S)
        assert setup.table.info().num_inserting == 4
        setup.registry.publish(["dead", "alive"], time.time() + 1000)
        die.set()
        for _ in range(6):
            (lease,) = setup.lease()
            assert torch.equal(setup.reader.fetch(lease).context, features(lease.sample.job)[0])
            assert lease.sample.target == "alive"
            setup.reader.ack([lease], 0)
        outcomes = setup.outcomes(6)
    assert [(capture, kind) for capture, _, kind in outcomes] == [(capture, "committed") for capture in range(6)]
    assert [attempt for _, attempt, _ in outcomes[:4]] == [1, 1, 1, 1]
    assert setup.table.info().peak_bytes == 4 * JOB_BYTES
    assert setup.shard.stats().num_retries >= 4
    assert client.keys("run:chunk:*") == []


def test_capture_whose_bytes_redis_did_not_take_in_time_goes_back_at_once(
    embedded: EmbeddedRedis, client: Client
) -> None:
    faults = iter([ReplayUnavailableError("Redis does not answer")])

    def time_out_once(job: CaptureJob, index: int) -> None:
        for error in faults:
            raise error

    setup = Setup(embedded, client, {"a": FakeTarget(fault=time_out_once)})
    with setup.running():
        setup.work.push(make_job(0))
        (lease,) = setup.lease()
        assert lease.sample.job.attempt == 1
        assert torch.equal(setup.reader.fetch(lease).context, features(make_job(0))[0])
    assert setup.targets["a"].asked == [(0, 0), (0, 1)]
    assert setup.table.info().resident_bytes == JOB_BYTES


def test_attempt_that_replaces_one_still_pulled_stays_in_flight(embedded: EmbeddedRedis, client: Client) -> None:
    """Redis was away: its queue gives a capture out again while the first attempt is still being pulled."""
    entered, first_goes_on, second_goes_on = threading.Semaphore(0), threading.Event(), threading.Event()

    def hold(job: CaptureJob, index: int) -> None:
        if index == 0:
            entered.release()
            assert (second_goes_on if job.attempt else first_goes_on).wait(WAIT_S)

    setup = Setup(embedded, client, {"a": FakeTarget(fault=hold)})
    with setup.running():
        setup.work.push(make_job(0))
        assert entered.acquire(timeout=WAIT_S)
        assert setup.work.expire(float("inf")) == [0]
        assert entered.acquire(timeout=WAIT_S)
        first_goes_on.set()
        wait_until(lambda: setup.shard.stats().num_in_flight == 1, "the end of the first attempt")
        second_goes_on.set()
        assert setup.outcomes(1) == [(0, 1, "committed")]
        wait_until(lambda: setup.shard.stats().num_in_flight == 0, "the end of the second attempt")
    assert setup.table.info().resident_bytes == JOB_BYTES


def test_bad_checksum_is_captured_again(
    embedded: EmbeddedRedis, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = shard_module.check_arrival
    spoiled: list[bytes] = []

    def spoil_once(chunk: Chunk, payload: memoryview, signature: TableSignature) -> None:
        if not spoiled and chunk.tensor == "last":
            spoiled.append(bytes(payload))
            payload = memoryview(bytes([payload[0] ^ 1]) + bytes(payload[1:]))
        plain(chunk, payload, signature)

    monkeypatch.setattr(shard_module, "check_arrival", spoil_once)
    setup = Setup(embedded, client, {"a": FakeTarget()})
    with setup.running():
        setup.work.push(make_job(0))
        (lease,) = setup.lease()
        assert lease.sample.job.attempt == 1
        assert torch.equal(setup.reader.fetch(lease).last, features(make_job(0))[1])
    assert setup.targets["a"].asked == [(0, 0), (0, 1)]
    assert any("checksum" in record["message"] for record in setup.events())


def test_capture_that_no_target_can_serve_is_skipped_with_its_reason(embedded: EmbeddedRedis, client: Client) -> None:
    def refuse(job: CaptureJob, index: int) -> None:
        if job.capture == 0:
            raise CaptureRequestError("120 tokens are more than max_tokens 100")

    setup = Setup(embedded, client, {"a": FakeTarget(fault=refuse)})
    with setup.running():
        for capture in (0, 1):
            setup.work.push(make_job(capture))
        assert setup.outcomes(2) == [(0, 0, "failed"), (1, 0, "committed")]
        assert "120 tokens are more than max_tokens 100 (there is no other target to ask)" in setup.reasons
    assert setup.targets["a"].asked.count((0, 0)) == 1
    assert setup.shard.stats().num_failed == 1
    assert setup.table.info().resident_bytes == JOB_BYTES


def test_capture_larger_than_the_buffer_is_skipped_with_its_reason(embedded: EmbeddedRedis, client: Client) -> None:
    setup = Setup(embedded, client, {"a": FakeTarget()})
    with setup.running():
        setup.work.push(make_job(0, tokens=24))
        setup.work.push(make_job(1))
        assert setup.outcomes(2) == [(0, 0, "failed"), (1, 0, "committed")]
        assert any("24 tokens needs 400 bytes" in reason for reason in setup.reasons)


def test_captures_wait_for_a_target_however_long_it_takes(embedded: EmbeddedRedis, client: Client) -> None:
    setup = Setup(embedded, client, {}, lease_s=0.2)
    setup.targets["a"] = FakeTarget()
    with setup.running():
        setup.work.push(make_job(0))

        def says_so() -> bool:
            return any("no target has served for 0.2 s" in record["message"] for record in setup.telemetry.read())

        wait_until(says_so, "an event")
        setup.registry.publish(["a"], time.time() + 1000)
        assert [kind for _, _, kind in setup.outcomes(1)] == ["committed"]


def test_target_of_other_weights_is_quarantined_and_never_used(embedded: EmbeddedRedis, client: Client) -> None:
    setup = Setup(embedded, client, {"a": FakeTarget(fingerprint="other"), "b": FakeTarget()})
    with setup.running():
        for capture in range(4):
            setup.work.push(make_job(capture))
        assert [kind for _, _, kind in setup.outcomes(4)] == ["committed"] * 4
    assert setup.targets["a"].asked == []
    assert setup.registry.live(time.time(), 10.0) == ["b"]
    (reason,) = setup.registry.publish(["a", "b"], time.time()).values()
    assert reason.startswith("it is no target of this run once: target fake has fingerprint other")


def test_captures_wait_when_every_target_has_other_weights(embedded: EmbeddedRedis, client: Client) -> None:
    setup = Setup(embedded, client, {"a": FakeTarget(fingerprint="other")})
    with setup.running():
        setup.work.push(make_job(0))
        wait_until(lambda: setup.registry.live(time.time(), 10.0) == [], "the quarantine")
        setup.targets["b"] = FakeTarget()
        setup.registry.publish(["b"], time.time() + 1000)
        assert setup.outcomes(1) == [(0, 1, "committed")]


def test_new_shard_takes_over_what_a_dead_one_had_taken(embedded: EmbeddedRedis, client: Client) -> None:
    setup = Setup(embedded, client, {"a": FakeTarget()})
    setup.table.create(setup.config.capacity, SIGNATURE, 1)
    jobs = [make_job(capture) for capture in range(4)]
    for job in jobs:
        setup.work.push(job)
        setup.work.take(time.time(), 1e6)
        setup.table.admit(job, JOB_BYTES, time.time())
    put_chunk(setup.table, jobs[0], 0, bytes(64))
    assert setup.table.info().num_inserting == 4
    with setup.running():
        assert setup.outcomes(4) == [(capture, 1, "committed") for capture in range(4)]
        (lease,) = setup.lease(captures=[0])
        assert torch.equal(setup.reader.fetch(lease).context, features(jobs[0])[0])
    assert setup.table.info().resident_bytes == 4 * JOB_BYTES


def test_stopped_shard_leaves_its_captures_to_the_next_one(embedded: EmbeddedRedis, client: Client) -> None:
    entered = threading.Event()

    def hang(job: CaptureJob, index: int) -> None:
        if index == 1 and job.attempt == 0:
            entered.set()
            wait_until(lambda: setup.shard._stop.is_set(), "the stop")

    setup = Setup(embedded, client, {"a": FakeTarget(fault=hang)})
    setup.work.push(make_job(0))
    with setup.running():
        assert entered.wait(WAIT_S)
    assert setup.table.drain_outcomes() == []
    setup.shard = setup.new_shard()
    with setup.running():
        assert setup.outcomes(1) == [(0, 1, "committed")]


def test_shard_makes_the_table_anew_after_redis_restarted_empty(tmp_path: Path) -> None:
    with EmbeddedRedis.start(tmp_path, 10_000_000) as running:
        client = connect(running.url)
        setup = Setup(running, client, {"a": FakeTarget()})
        with setup.running():
            setup.work.push(make_job(0))
            setup.lease()
            setup.table.set_generation(4)
            incarnation = setup.table.incarnation()
            wait_until(lambda: setup.shard._generation == 4, "the shard's look at the generation")
            (server,) = psutil.Process(running.pid).children()
            os.kill(server.pid, 9)

            def made_anew() -> bool:
                try:
                    return setup.table.incarnation() not in (None, incarnation)
                except ReplayUnavailableError:
                    return False

            wait_until(made_anew, "a new table")
            wait_until(lambda: setup.table.generation() == 4, "the generation")
            setup.registry.publish(["a"], time.time() + 1000)
            setup.work.push(make_job(0))
            (lease,) = setup.reader.lease(rank=0, generation=4, count=1, lease_s=LEASE_S, timeout_s=WAIT_S)
            assert torch.equal(setup.reader.fetch(lease).context, features(make_job(0))[0])
        (record,) = setup.events()
        assert (record["kind"], record["event"]) == ("event", "redis")
        assert "empty: what it held is captured again" in record["message"]


def test_shard_that_takes_over_says_that_redis_restarted_empty_before_it(
    embedded: EmbeddedRedis, client: Client
) -> None:
    setup = Setup(embedded, client, {})
    with setup.running():
        wait_until(lambda: setup.table.incarnation() is not None, "a table")
    assert [record["message"] for record in setup.events()] == ["Redis is back, empty: what it held is captured again"]
    setup.shard = setup.new_shard()
    with setup.running():
        setup.work.push(make_job(0))
        wait_until(lambda: setup.shard.stats().num_in_flight == 1, "the shard at work")
    assert setup.telemetry.read() == [], "a table that is there is taken over without a word"


def test_table_of_another_signature_ends_the_shard(embedded: EmbeddedRedis, client: Client) -> None:
    setup = Setup(embedded, client, {})
    setup.table.create(1000, SIGNATURE.model_copy(update={"fingerprint": "other"}), 1)
    with pytest.raises(SignatureError, match="other"):
        setup.shard.run()
    with pytest.raises(SignatureError, match="this reader expects"):
        setup.lease()


def test_lease_that_is_not_ready_in_time_says_what_it_waited_for(embedded: EmbeddedRedis, client: Client) -> None:
    setup = Setup(embedded, client, {})
    setup.table.create(1000, SIGNATURE, 1)
    with pytest.raises(DeadlineError, match=r"2 samples were not ready .* after 0.05 s: 0 ready, 0 leased, 0 being"):
        setup.lease(2, timeout_s=0.05)
    with pytest.raises(DeadlineError, match=r"captures \[7\] were not ready"):
        setup.lease(captures=[7], timeout_s=0.0)
    cancelled = threading.Event()
    cancelled.set()
    assert setup.lease(cancelled=cancelled) == []


def test_sealed_table_without_anything_ready_gives_nothing_at_once(embedded: EmbeddedRedis, client: Client) -> None:
    setup = Setup(embedded, client, {"a": FakeTarget()})
    with setup.running():
        setup.work.push(make_job(0))
        setup.outcomes(1)
        setup.table.seal()
        assert len(setup.lease(2)) == 1
        assert setup.lease(2) == []


def test_chunk_of_another_length_is_refused(embedded: EmbeddedRedis, client: Client) -> None:
    setup = Setup(embedded, client, {"a": FakeTarget()})
    with setup.running():
        setup.work.push(make_job(0))
        (lease,) = setup.lease()
        client.set("run:chunk:0:0:1", b"short")
        with pytest.raises(WireError, match="chunk 1 of capture 0 has 5 bytes in the replay buffer, its rows need 16"):
            setup.reader.fetch(lease)


def test_released_lease_can_be_had_again(embedded: EmbeddedRedis, client: Client) -> None:
    setup = Setup(embedded, client, {"a": FakeTarget()})
    with setup.running():
        setup.work.push(make_job(0))
        first = setup.lease()
        setup.reader.release(first, 0)
        (again,) = setup.lease()
        assert again.use == first[0].use
    setup.reader.close()


@pytest.fixture(scope="module")
def tiny_target(tmp_path_factory: pytest.TempPathFactory) -> Path:
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
        initializer_range=0.3,
    )
    folder = tmp_path_factory.mktemp("target")
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder


def test_real_target_over_grpc_gives_its_own_hidden_states(
    embedded: EmbeddedRedis, client: Client, tiny_target: Path
) -> None:
    from transformers import Qwen3ForCausalLM

    from services.models import read_shape
    from services.target.config import TargetConfig
    from services.target.engine import TransformersEngine
    from services.target.server import serve

    signature = TableSignature(
        fingerprint=read_shape(tiny_target).fingerprint, layer_ids=(2, -1, 0), hidden_size=16, dtype="fp32"
    )
    generator = torch.Generator().manual_seed(0)
    jobs = [
        CaptureJob(
            capture=capture,
            prompt=capture,
            epoch=0,
            input_ids=tuple(torch.randint(50, (length,), generator=generator).tolist()),
            loss_mask=(1,) * length,
            last_rows=tuple(range(0, length - 1, 2)),
        )
        for capture, length in enumerate([5, 65, 33, 9, 21, 64])
    ]
    target_config = TargetConfig(model=str(tiny_target), dtype="float32", num_gpus=0, threads=1)
    server = serve(TransformersEngine(target_config), target_config)
    config = ReplayConfig.model_validate({"capacity": "40KB", "chunk": 1024, "pulls": 3, "lease_s": LEASE_S})
    shard = ReplayShard(embedded.url, PREFIX, config, signature)
    table, work = RedisTable(client, PREFIX), WorkQueue(client, PREFIX)
    reader = ReplayReader(embedded.url, PREFIX, signature)
    TargetRegistry(client, PREFIX).publish([server.address], time.time() + 1000)
    for job in jobs:
        work.push(job)
    thread = threading.Thread(target=shard.run)
    thread.start()
    samples = {}
    try:
        for _ in range(5):
            leases = reader.lease(rank=0, generation=0, count=1, lease_s=LEASE_S, timeout_s=WAIT_S)
            sample = reader.fetch(leases[0])
            samples[sample.lease.sample.job.capture] = sample
            reader.ack(leases, 0)
        wait_until(lambda: work.size() == 0 and table.info().num_inserting == 0, "the end of the work")
    finally:
        shard.stop()
        thread.join(WAIT_S)
        server.stop()
    assert not thread.is_alive()

    model = Qwen3ForCausalLM.from_pretrained(tiny_target, dtype=torch.float32)
    for job in (jobs[0], *jobs[2:]):
        sample = samples[job.capture]
        with torch.no_grad():
            hidden = model(torch.tensor([job.input_ids]), output_hidden_states=True).hidden_states
        wanted = torch.cat([hidden[layer + 1][0] for layer in (2, -1, 0)], dim=-1)
        torch.testing.assert_close(sample.context, wanted, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(sample.last, hidden[-1][0, list(job.last_rows)], rtol=1e-4, atol=1e-4)
        assert sample.input_ids.tolist() == list(job.input_ids)
    outcomes = {outcome.capture: outcome for outcome in table.drain_outcomes()}
    assert [outcomes[capture].kind for capture in range(6)] == ["committed", "failed", *["committed"] * 4]
    assert not outcomes[1].retry
    assert "65 tokens are more than this target's max_tokens 64" in outcomes[1].reason
    assert table.info().peak_bytes <= 40_000


def make_question(capture: int, *, max_new_tokens: int = 6, min_new_tokens: int = 1) -> CaptureJob:
    generation = Generation(
        max_new_tokens=max_new_tokens, min_new_tokens=min_new_tokens, stop_token_ids=(), last_rows=LastRows.BETWEEN
    )
    return CaptureJob(
        capture=capture, prompt=capture, epoch=0, input_ids=(1, 2), loss_mask=(0, 0), last_rows=(), generate=generation
    )


def test_answer_is_on_disk_before_its_sample_and_spare_bytes_come_back(
    embedded: EmbeddedRedis, client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = FakeTarget()
    setup = Setup(embedded, client, {"a": target}, answers=tmp_path / "answers.jsonl")
    seen: list[tuple[int, ...] | None] = []
    commit = RedisTable.commit

    def look_and_commit(table: RedisTable, sample: Sample, now_s: float) -> None:
        seen.append(AnswerBook(tmp_path / "answers.jsonl").find(sample.job.prompt))
        commit(table, sample, now_s)

    monkeypatch.setattr(RedisTable, "commit", look_and_commit)
    with setup.running():
        setup.work.push(make_question(4))
        (lease,) = setup.lease()
        assert setup.outcomes(1) == [(4, 0, "committed")]
        sample = setup.reader.fetch(lease)
        resident = setup.table.info().resident_bytes
        setup.reader.ack([lease], 0)
    assert seen == [(7, 8, 9)]
    assert resident == JOB_BYTES  # two tokens of the prompt and three of the answer; up to eight were reserved
    assert setup.table.info().peak_bytes == SIGNATURE.reserved_bytes(make_question(4)) > JOB_BYTES
    assert setup.table.info().resident_bytes == 0
    assert sample.input_ids.tolist() == [1, 2, 7, 8, 9]
    assert sample.loss_mask.tolist() == [0, 0, 1, 1, 1]
    assert sample.last_rows.tolist() == [2, 3]


def test_answer_too_short_to_learn_from_is_kept_and_goes_back_to_the_coordinator(
    embedded: EmbeddedRedis, client: Client, tmp_path: Path
) -> None:
    setup = Setup(embedded, client, {"a": FakeTarget()}, answers=tmp_path / "answers.jsonl")
    with setup.running():
        setup.work.push(make_question(4, min_new_tokens=4))
        assert setup.outcomes(1) == [(4, 0, "failed")]
    assert setup.reasons == ["the target's answer has only 3 tokens"]
    assert AnswerBook(tmp_path / "answers.jsonl").find(4) == (7, 8, 9)
    assert setup.table.info().resident_bytes == 0
