"""The metric stream on a real Redis: bounded, ordered, and never in anybody's way."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
from waiting import WAIT_S, wait_until

from services import telemetry
from services.replay.connect import Client, connect
from services.replay.embedded import EmbeddedRedis
from services.telemetry import TelemetryReader, TelemetryWriter

HANGS_S = 3600.0


@pytest.fixture(autouse=True)
def patient_close(monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer's last records arrive, however slow the machine."""
    monkeypatch.setattr(telemetry, "CLOSE_TIMEOUT_S", WAIT_S)


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedRedis]:
    with EmbeddedRedis.start(tmp_path_factory.mktemp("redis"), 1_000_000) as running:
        yield running


@pytest.fixture
def client(embedded: EmbeddedRedis) -> Iterator[Client]:
    client = connect(embedded.url)
    yield client
    client.flushdb()


def test_records_arrive_in_order_with_time_and_kind(client: Client) -> None:
    before_s = time.time()
    with TelemetryWriter(client, "run") as writer:
        writer.emit("step", step=1, loss=2.5, tau=[1.0, 0.5])
        writer.emit("event", time_s=5.0, event="restart", message="a target – again")
    reader = TelemetryReader(client, "run")
    first, second = reader.read()
    assert before_s <= first.pop("time_s") <= time.time()
    assert first == {"kind": "step", "step": 1, "loss": 2.5, "tau": [1.0, 0.5]}
    assert second == {"kind": "event", "time_s": 5.0, "event": "restart", "message": "a target – again"}
    assert reader.read() == []
    assert writer.num_dropped == 0


def test_read_without_blocking_returns_at_once_from_an_empty_stream(client: Client) -> None:
    assert TelemetryReader(client, "run").read(block_ms=0) == []


def test_blocking_read_ends_with_the_next_record(client: Client) -> None:
    reader = TelemetryReader(client, "run")
    assert reader.read(block_ms=20) == []
    records: list[dict[str, object]] = []

    def read() -> None:
        while not records:
            records.extend(reader.read(block_ms=5000))

    waiting = threading.Thread(target=read)
    waiting.start()
    wait_until(lambda: client.info("clients")["blocked_clients"] == 1, "the blocking read")
    with TelemetryWriter(client, "run") as writer:
        writer.emit("step", step=3)
    waiting.join(WAIT_S)
    assert [record["step"] for record in records] == [3]


def test_several_writers_and_readers_share_a_stream(client: Client) -> None:
    with TelemetryWriter(client, "run") as one, TelemetryWriter(client, "run") as two:
        for number in range(50):
            one.emit("step", number=number)
            two.emit("step", number=number)
    for _ in range(2):
        reader = TelemetryReader(client, "run")
        numbers = [record["number"] for _ in range(12) for record in reader.read(count=9)]
        assert sorted(numbers) == sorted([*range(50), *range(50)])
    assert TelemetryReader(client, "other").read() == []


def test_stream_keeps_the_newest_records(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telemetry, "MOST_RECORDS", 200)
    with TelemetryWriter(client, "run") as writer:
        for number in range(900):
            writer.emit("step", number=number)
    kept = client.xlen("run:telemetry")
    assert 200 <= kept < 400  # Redis trims whole nodes of a hundred entries
    reader = TelemetryReader(client, "run")
    assert [record["number"] for record in reader.read()] == list(range(900 - kept, 900))


def test_records_are_dropped_and_counted_while_redis_hangs(
    embedded: EmbeddedRedis, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(telemetry, "QUEUE_RECORDS", 5)
    patient = connect(embedded.url, timeout_s=HANGS_S)
    with TelemetryWriter(patient, "run") as writer:
        client.client_pause(int(HANGS_S * 1000), all=False)  # writes hang
        try:
            writer.emit("step", number=0)
            wait_until(writer._queue.empty, "the thread to take the first record")
            for number in range(1, 100):
                writer.emit("step", number=number)  # one that waited for Redis would wait for ever
            assert writer.num_dropped == 94, "one is with the thread, and five wait"
        finally:
            client.client_unpause()
    assert [record["number"] for record in TelemetryReader(client, "run").read()] == list(range(6))
    patient.close()


def test_redis_that_is_gone_costs_records_and_nothing_else(tmp_path_factory: pytest.TempPathFactory) -> None:
    running = EmbeddedRedis.start(tmp_path_factory.mktemp("redis"), 1_000_000)
    client = connect(running.url)
    writer = TelemetryWriter(client, "run")
    running.close()
    for number in range(10):
        writer.emit("step", number=number)
    writer.close()
    writer.emit("step", number=10)
    assert writer.num_dropped == 11


def test_field_that_json_cannot_hold_is_a_defect_of_the_caller(client: Client) -> None:
    with TelemetryWriter(client, "run") as writer, pytest.raises(TypeError, match="set"):
        writer.emit("step", ranks={1, 2})
