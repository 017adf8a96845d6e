"""`slipstream replay serve` as a user runs it: producers and consumers in processes of their own, and SIGKILL."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import Command
from own_redis import PASSWORD, own_redis
from waiting import wait_until

from services.contracts import TableSignature
from services.errors import ReplayAccessError
from services.replay.audit import audit_table
from services.replay.connect import Client, connect
from services.replay.embedded import EmbeddedRedis
from services.replay.service_client import ReplayClient
from services.replay.table import RedisTable
from services.security import Credentials, read_certificate, read_token

Start = Callable[..., Command]

ROOT = Path(__file__).parents[2]
START_S = 300.0
SIGNATURE = TableSignature(fingerprint="f00d", layer_ids=(1, 3), hidden_size=8, dtype="bf16")
HOLDS = ("--fingerprint", "f00d", "--hidden-size", "8", "--layers", "1,3")
SAMPLE_BYTES = 6 * 32 + 2 * 16

PRODUCER = """
import sys, time
from services.contracts import TableSignature
from services.replay.service_client import ReplayClient

address, first, number, pause_s = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
signature = TableSignature(fingerprint="f00d", layer_ids=(1, 3), hidden_size=8, dtype="bf16")
with ReplayClient(address) as client, client.producer(signature, "a process") as producer:
    stream = producer._open()
    plain_send, sent = stream.send, 0
    def send(message):
        global sent
        plain_send(message)
        sent += 1
        if pause_s and sent % 3 == 2:  # between a sample's two chunks
            print("half", flush=True)
            time.sleep(pause_s)
    stream.send = send
    for sample in range(first, first + number):
        inserted = producer.insert(
            sample, token_ids=range(6), loss_mask=[0, 0, 0, 1, 1, 1], last_rows=[3, 4],
            context=bytes([sample]) * 192, last=bytes([sample, 1]) * 16,
        )
        print("inserted" if inserted else "already", sample, flush=True)
"""

CONSUMER = """
import sys
from services.replay.service_client import ReplayClient

with ReplayClient(sys.argv[1]) as client:
    for _ in range(int(sys.argv[2])):
        (sample,) = client.take(count=1, lease_s=600, wait_s=600)
        number = sample.lease.sample.job.capture
        assert sample.context == bytes([number]) * 192 and sample.last == bytes([number, 1]) * 16
        client.ack([sample.lease])
        print("took", number, flush=True)
"""


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedRedis]:
    with EmbeddedRedis.start(tmp_path_factory.mktemp("redis"), 8 * 1024**2) as running:
        yield running


@pytest.fixture
def redis(embedded: EmbeddedRedis) -> Iterator[Client]:
    client = connect(embedded.url)
    client.flushall()
    yield client
    client.close()


def first_line(command: Command) -> dict[str, Any]:
    """The JSON object that a serving replay buffer prints."""
    assert command.process.stdout is not None
    deadline_s = time.monotonic() + START_S
    readable: list[object] = []
    while not readable and command.process.poll() is None and time.monotonic() < deadline_s:
        readable, _, _ = select.select([command.process.stdout], [], [], 0.2)
    line = command.process.stdout.readline() if readable else ""
    assert line, command.errors
    place: dict[str, Any] = json.loads(line)
    return place


def serve(slipstream: Start, url: str, *more: str, samples: int = 2) -> tuple[Command, dict[str, Any]]:
    capacity = str(samples * SAMPLE_BYTES)
    command = slipstream(
        "replay", "serve", "--redis", url, *HOLDS, "--capacity", capacity, "--port", "0", *more, "--json"
    )
    return command, first_line(command)


def python(script: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def read_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line or process.stderr is None, process.communicate()[1]
    return line.strip()


def output_of(process: subprocess.Popen[str]) -> list[str]:
    output, errors = process.communicate(timeout=START_S)
    assert process.returncode == 0, errors
    return output.splitlines()


def end(command: Command) -> None:
    command.signal_group(signal.SIGINT)
    code, rest = command.result()
    assert (code, rest) == (0, ""), command.errors
    assert "stopped" in command.errors
    assert "Traceback" not in command.errors


def test_producer_and_consumer_processes_stream_through_a_small_buffer(
    slipstream: Start, embedded: EmbeddedRedis, redis: Client
) -> None:
    command, place = serve(slipstream, embedded.url)
    assert (place["token"], place["tls"], place["capacity_bytes"]) == (False, False, 2 * SAMPLE_BYTES)
    assert TableSignature.model_validate(place["signature"]) == SIGNATURE
    producer, consumer = python(PRODUCER, place["address"], 0, 20, 0), python(CONSUMER, place["address"], 20)
    assert output_of(producer) == [f"inserted {number}" for number in range(20)]
    assert output_of(consumer) == [f"took {number}" for number in range(20)]
    info = RedisTable(redis, place["prefix"]).info()
    assert (info.inserts, info.deletes, info.resident_bytes) == (20, 20, 0)
    assert info.peak_bytes <= 2 * SAMPLE_BYTES
    assert audit_table(redis, place["prefix"]) == []
    end(command)


def test_producer_killed_in_mid_sample_gives_its_bytes_back(
    slipstream: Start, embedded: EmbeddedRedis, redis: Client
) -> None:
    command, place = serve(slipstream, embedded.url)
    table = RedisTable(redis, place["prefix"])
    producer = python(PRODUCER, place["address"], 1, 1, 600)
    assert read_line(producer) == "half"
    wait_until(lambda: table.info().num_inserting == 1, "a sample on its way")
    assert table.info().resident_bytes == SAMPLE_BYTES
    assert audit_table(redis, place["prefix"]) == []
    producer.kill()
    producer.communicate()
    wait_until(lambda: table.info().resident_bytes == 0, "the bytes of the killed producer")
    assert audit_table(redis, place["prefix"]) == []
    assert redis.keys(f"{place['prefix']}:chunk:*") == []
    assert output_of(python(PRODUCER, place["address"], 1, 1, 0)) == ["inserted 1"]
    assert output_of(python(CONSUMER, place["address"], 1)) == ["took 1"]
    end(command)


def test_killed_service_goes_on_where_it_was(slipstream: Start, embedded: EmbeddedRedis, redis: Client) -> None:
    """One sample is committed, one half-done, one waits for room. Who has the port is the same service."""
    command, place = serve(slipstream, embedded.url)
    port = place["address"].rpartition(":")[2]
    end(command)
    command, place = serve(slipstream, embedded.url, "--port", port)
    table = RedisTable(redis, place["prefix"])
    assert output_of(python(PRODUCER, place["address"], 1, 1, 0)) == ["inserted 1"]
    half = python(PRODUCER, place["address"], 2, 1, 600)
    assert read_line(half) == "half"
    waiting = python(PRODUCER, place["address"], 3, 1, 0)
    wait_until(lambda: redis.hlen(f"{place['prefix']}:work:jobs") == 2, "one half-done, one that waits")
    command.process.kill()
    command.result()
    for producer in (half, waiting):
        producer.kill()
        producer.communicate()
    assert table.info().num_inserting == 1
    assert audit_table(redis, place["prefix"]) == []
    again, place = serve(slipstream, embedded.url, "--port", port)
    assert table.info().num_inserting == 0
    assert table.info().resident_bytes == SAMPLE_BYTES
    assert audit_table(redis, place["prefix"]) == []
    assert "2 samples that were on their way when the service ended are freed" in again.errors
    producer = python(PRODUCER, place["address"], 1, 3, 0)
    assert output_of(python(CONSUMER, place["address"], 3)) == ["took 1", "took 2", "took 3"]
    assert output_of(producer) == ["already 1", "inserted 2", "inserted 3"]
    end(again)


def test_service_with_a_redis_of_its_own_leaves_nothing(slipstream: Start) -> None:
    command, place = serve(slipstream, "embedded")
    assert output_of(python(PRODUCER, place["address"], 1, 1, 0)) == ["inserted 1"]
    end(command)
    command.assert_nothing_left()


def test_service_beyond_loopback_makes_its_credentials(
    slipstream: Start, embedded: EmbeddedRedis, redis: Client, tmp_path: Path
) -> None:
    command, place = serve(slipstream, embedded.url, "--host", "0.0.0.0", "--credentials", "c")
    assert (place["token"], place["tls"]) == (True, True)
    certificate, token = read_certificate(tmp_path / "c" / "certificate.pem"), read_token(tmp_path / "c" / "token")
    with ReplayClient(place["address"], Credentials(token, certificate)) as client:
        assert client.info().signature == SIGNATURE
    with ReplayClient(place["address"]) as client, pytest.raises(ReplayAccessError, match="speaks TLS"):
        client.info()
    end(command)
    assert token not in command.errors


def test_password_of_redis_is_shown_to_nobody(
    slipstream: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "redis"
    folder.mkdir()
    with own_redis(folder) as server:
        monkeypatch.setenv("SLIPSTREAM_REDIS_PASSWORD", PASSWORD)
        command, place = serve(slipstream, server.url, "--advertise-redis", f"redis://trainer:{'secret'}@host:1/0")
        with ReplayClient(place["address"]) as client:
            assert client.info().redis_url == "redis://trainer@host:1/0"
        end(command)
        assert PASSWORD not in command.errors + json.dumps(place)
        assert "secret" not in command.errors + json.dumps(place)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--host", "0.0.0.0"), "without token and TLS whoever reaches it could use it"),
        (("--capacity", "lots"), "--capacity 'lots'"),
        (("--samples-per-insert", "2"), "does nothing without --error-buffer"),
        (("--selector", "prioritized"), "needs --reuse of 2 or more"),
        (("--layers", "1,1"), "must be different layers"),
        (("--layers", "one"), "no list of layer numbers"),
        (("--name", "a b"), "--name 'a b' must be of letters"),
        (("--signature-from", "127.0.0.1:1"), "leave out --fingerprint"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_started(
    slipstream: Start, arguments: tuple[str, ...], says: str
) -> None:
    command = slipstream("replay", "serve", "--redis", "embedded", *HOLDS, *arguments)
    code, _ = command.result()
    assert code == 2
    assert says in " ".join(command.errors.split())


@pytest.mark.parametrize(
    ("url", "says"),
    [("redis://127.0.0.1:1/0", "Redis at redis://127.0.0.1:1/0 does not answer"), ("http://x", "is no Redis URL")],
)
def test_redis_that_does_not_answer_is_named(slipstream: Start, url: str, says: str) -> None:
    command = slipstream("replay", "serve", "--redis", url, *HOLDS)
    code, _ = command.result()
    assert code == 1
    assert says in " ".join(command.errors.split())
