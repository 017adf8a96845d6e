"""The chunk store in a real Redis, over each kind of connection: how it runs ahead of the answers, and what fails."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from own_redis import PASSWORD, USER, own_redis, tls_in_front_of
from replaying import failed, lease
from waiting import WAIT_S, wait_until

from services.contracts import CaptureJob, Chunk, Sample, TableSignature
from services.errors import ReplayError, ReplayUnavailableError, UnknownSampleError, WireError
from services.replay import redis_store
from services.replay.connect import Client, connect
from services.replay.embedded import EmbeddedRedis
from services.replay.raw_connection import RawConnection
from services.replay.redis_store import RedisChunkStore
from services.replay.rules import Admission
from services.replay.table import RedisTable
from services.replay.urls import PASSWORD_VARIABLE, with_password

SIGNATURE = TableSignature(fingerprint="f", layer_ids=(0, 1), hidden_size=4096, dtype="bf16")
ROW_BYTES = 2 * 8192
CHUNK_ROWS = 96
"""1.5 MiB: more than a socket takes at once."""

TOKENS = 500
CAPACITY_BYTES = 100 * 1024**2
PREFIX = "slipstream:chunks"


def make_job(capture: int, attempt: int = 0) -> CaptureJob:
    return CaptureJob(
        capture=capture,
        attempt=attempt,
        prompt=capture,
        epoch=0,
        input_ids=(1,) * TOKENS,
        loss_mask=(0, *(1,) * (TOKENS - 1)),
        last_rows=(1,),
    )


def make_sample(job: CaptureJob) -> Sample:
    starts = range(0, TOKENS, CHUNK_ROWS)
    rows = [("context", start, min(start + CHUNK_ROWS, TOKENS), ROW_BYTES) for start in starts]
    rows.append(("last", 0, 1, ROW_BYTES // 2))
    chunks = tuple(
        Chunk(tensor=tensor, row_start=start, row_end=end, num_bytes=(end - start) * row_bytes, crc32c=0)
        for tensor, start, end, row_bytes in rows
    )
    return Sample(job=job, chunks=chunks, num_bytes=SIGNATURE.reserved_bytes(job), target="somewhere")


def content(job: CaptureJob, index: int, num_bytes: int) -> bytes:
    """Other bytes in every chunk, and no short period."""
    seed = (job.capture * 31 + job.attempt * 7 + index + 1).to_bytes(3, "little") + b"chunk\r\n$7"
    return (seed * (num_bytes // len(seed) + 1))[:num_bytes]


def admit(table: RedisTable, job: CaptureJob) -> None:
    assert table.admit(job, SIGNATURE.reserved_bytes(job), 0.0) is Admission.ADMITTED


def write(table: RedisTable, job: CaptureJob) -> Sample:
    """Write and commit."""
    sample = make_sample(job)
    with table.writing(job) as writer:
        for index, chunk in enumerate(sample.chunks):
            writer.write(index, content(job, index, chunk.num_bytes))
    table.commit(sample, 0.0)
    return sample


def check(table: RedisTable, sample: Sample) -> None:
    """Read all of a sample into one block of memory, each chunk to its place."""
    block, start = bytearray(sample.num_bytes + 1), 0
    for index, chunk in enumerate(sample.chunks):
        table.read_into(sample.job, index, memoryview(block)[start : start + chunk.num_bytes])
        assert block[start : start + chunk.num_bytes] == content(sample.job, index, chunk.num_bytes)
        assert block[start + chunk.num_bytes] == 0
        start += chunk.num_bytes


def make_table(client: Client) -> RedisTable:
    table = RedisTable(client, PREFIX)
    table.create(CAPACITY_BYTES, SIGNATURE, max_times_sampled=1)
    return table


def num_chunks(client: Client) -> int:
    return len(client.keys(f"{PREFIX}:chunk:*"))


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedRedis]:
    with EmbeddedRedis.start(tmp_path_factory.mktemp("redis"), CAPACITY_BYTES) as running:
        yield running


@pytest.fixture(scope="module")
def urls(embedded: EmbeddedRedis, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A unix socket; TCP with a user of few rights and a password; the same within TLS."""
    folder = tmp_path_factory.mktemp("own")
    with own_redis(folder) as server, tls_in_front_of(server.address, folder) as proxy:
        inside_tls = f"rediss://{USER}@{proxy.address}/0?ssl_ca_certs={proxy.certificate}"
        environment = {PASSWORD_VARIABLE: PASSWORD}
        yield {
            "unix": embedded.url,
            "tcp": with_password(server.url, environment),
            "tls": with_password(inside_tls, environment),
        }


@pytest.fixture
def client(embedded: EmbeddedRedis) -> Iterator[Client]:
    client = connect(embedded.url)
    yield client
    client.close()


@pytest.fixture
def table(client: Client) -> Iterator[RedisTable]:
    table = make_table(client)
    yield table
    table.close()
    table.destroy()


@pytest.mark.parametrize("kind", ["unix", "tcp", "tls"])
@pytest.mark.parametrize("ahead_bytes", [0, 2 * 1024**2, redis_store.MOST_UNANSWERED_BYTES])
def test_chunks_are_read_as_they_were_written(
    urls: dict[str, str], kind: str, ahead_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_store, "MOST_UNANSWERED_BYTES", ahead_bytes)
    client = connect(urls[kind])
    table = make_table(client)
    job = make_job(0)
    admit(table, job)
    sample = write(table, job)
    check(table, sample)
    assert num_chunks_by_record(table) == len(sample.chunks)
    table.close()
    table.destroy()
    client.close()


def num_chunks_by_record(table: RedisTable) -> int:
    (leased,) = lease(table)
    return len(leased.sample.chunks)


@pytest.mark.parametrize("kind", ["unix", "tls"])
def test_threads_write_and_read_at_once(urls: dict[str, str], kind: str) -> None:
    client = connect(urls[kind])
    table = make_table(client)
    both_write = threading.Barrier(3)

    def write_and_read(capture: int) -> None:
        job = make_job(capture)
        admit(table, job)
        both_write.wait(WAIT_S)
        check(table, write(table, job))

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(write_and_read, range(3)))
    assert table.info().num_ready == 3
    table.close()
    table.destroy()
    client.close()


@pytest.mark.parametrize("kind", ["unix", "tls"])
def test_connections_are_kept_for_the_next_and_closed_in_the_end(urls: dict[str, str], kind: str) -> None:
    client = connect(urls[kind])
    table = make_table(client)
    opened = client.info("stats")["total_connections_received"]
    for capture in range(3):
        admit(table, make_job(capture))
        check(table, write(table, make_job(capture)))
    assert client.info("stats")["total_connections_received"] == opened + 1
    table.close()
    wait_until(lambda: client.info("clients")["connected_clients"] == 1, "the end of the connection")
    table.destroy()
    client.close()


def test_place_of_another_length_is_refused_and_the_next_read_is_right(table: RedisTable) -> None:
    admit(table, make_job(0))
    sample = write(table, make_job(0))
    stored = sample.chunks[0].num_bytes
    for wanted in (0, 1, stored - 1, stored + 1, stored * 10):
        with pytest.raises(WireError, match=f"chunk 0 of capture 0 has {stored} bytes .* need {wanted}$"):
            table.read_into(sample.job, 0, bytearray(wanted))
    with pytest.raises(UnknownSampleError, match="chunk 99 of capture 0 is not in the replay buffer"):
        table.read_into(sample.job, 99, bytearray(stored))
    check(table, sample)


# What is refused while the writer runs ahead.


def test_capture_freed_while_it_is_written_leaves_nothing_behind(table: RedisTable, client: Client) -> None:
    job = make_job(0)
    admit(table, job)

    def write_on() -> None:
        with table.writing(job) as writer:
            writer.write(0, bytes(100_000))
            writer.write(1, bytes(100_000))
            table.abandon(job, failed(job))
            writer.write(2, bytes(100_000))
            writer.flush()

    with pytest.raises(UnknownSampleError, match=r"attempt 0 of capture 0 .* abandoned"):
        write_on()
    assert (num_chunks(client), table.info().resident_bytes) == (0, 0)


def test_capture_freed_between_place_and_payload_leaves_nothing_behind(
    table: RedisTable, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(0)
    admit(table, job)
    send = RawConnection.send

    def free_before_payload(connection: RawConnection, pieces: list[bytes | memoryview], num_replies: int) -> None:
        if b"\r\nSET\r\n" in pieces[0] and b"EVALSHA" not in pieces[0]:
            assert num_chunks(client) == 1
            table.abandon(job, failed(job))
        send(connection, pieces, num_replies)

    monkeypatch.setattr(RawConnection, "send", free_before_payload)

    def write_on() -> None:
        with table.writing(job) as writer:
            writer.write(0, bytes(100_000))
            writer.flush()

    with pytest.raises(UnknownSampleError, match="abandoned"):
        write_on()
    assert (num_chunks(client), table.info().resident_bytes) == (0, 0)


def test_newer_attempt_is_not_touched_by_what_the_older_one_still_writes(table: RedisTable, client: Client) -> None:
    old, new = make_job(0), make_job(0, attempt=1)
    admit(table, old)

    def write_on() -> None:
        with table.writing(old) as writer:
            writer.write(0, bytes(100_000))
            admit(table, new)
            write(table, new)
            for index in range(1, 4):
                writer.write(index, bytes(100_000))

    with pytest.raises(UnknownSampleError, match="attempt 0 of capture 0 is not being inserted"):
        write_on()
    check(table, make_sample(new))
    assert num_chunks(client) == len(make_sample(new).chunks)


def test_error_of_a_chunk_is_that_of_the_first_that_was_wrong(table: RedisTable, client: Client) -> None:
    job = make_job(0)
    reserved = SIGNATURE.reserved_bytes(job)
    admit(table, job)

    def write_on() -> None:
        with table.writing(job) as writer:
            writer.write(0, bytes(100_000))
            writer.write(1, bytes(reserved - 99_999))
            writer.write(2, bytes(1000))

    with pytest.raises(WireError, match=f"chunk 1 brings it to {reserved + 1} bytes, {reserved} are"):
        write_on()
    assert client.keys(f"{PREFIX}:chunk:*") == [f"{PREFIX}:chunk:0:0:0".encode()]


def test_chunk_replaced_by_one_that_is_refused_stays_as_it_was(table: RedisTable) -> None:
    job = make_job(0)
    admit(table, job)
    first = content(job, 0, 1000)

    def write_on() -> None:
        with table.writing(job) as writer:
            writer.write(0, first)
            writer.write(1, bytes(1000))
            writer.write(0, bytes(SIGNATURE.reserved_bytes(job)))

    with pytest.raises(WireError, match="chunk 0 brings it to"):
        write_on()
    place = bytearray(1000)
    table.read_into(job, 0, place)
    assert place == first


def test_error_within_the_context_gives_up_and_the_next_attempt_is_written_whole(table: RedisTable) -> None:
    job = make_job(0)
    admit(table, job)

    def write_on() -> None:
        with table.writing(job) as writer:
            writer.write(0, bytes(100_000))
            writer.write(1, bytes(100_000))
            raise WireError("from the target")

    with pytest.raises(WireError, match="from the target"):
        write_on()
    again = make_job(0, attempt=1)
    admit(table, again)
    check(table, write(table, again))


def test_scripts_that_redis_forgot_are_sent_again(table: RedisTable, client: Client) -> None:
    for capture in range(2):
        client.script_flush()
        admit(table, make_job(capture))
        client.script_flush()
        check(table, write(table, make_job(capture)))


def test_scripts_forgotten_amid_a_capture_cost_that_attempt(table: RedisTable, client: Client) -> None:
    job = make_job(0)
    admit(table, job)

    def write_on() -> None:
        with table.writing(job) as writer:
            writer.write(0, bytes(100_000))
            client.script_flush()
            writer.write(1, bytes(100_000))

    with pytest.raises(ReplayUnavailableError, match="forgotten its scripts"):
        write_on()
    again = make_job(0, attempt=1)
    admit(table, again)
    check(table, write(table, again))


# What fails.


def test_redis_at_its_maxmemory_says_what_to_raise(table: RedisTable, client: Client) -> None:
    job, limit = make_job(0), client.config_get("maxmemory")["maxmemory"]
    admit(table, job)
    # Redis frees in the background what the tests before have removed.
    wait_until(lambda: client.info("memory")["lazyfree_pending_objects"] == 0, "the memory of the samples before")
    client.config_set("maxmemory", client.info("memory")["used_memory"] + 2 * 1024**2)
    try:
        with pytest.raises(ReplayError, match=r"at its maxmemory .* Raise maxmemory"):
            write(table, job)
        client.config_set("maxmemory", 1000)
        with pytest.raises(ReplayError, match=r"at its maxmemory .* Raise maxmemory"):
            table.admit(make_job(1), SIGNATURE.reserved_bytes(job), 0.0)
    finally:
        client.config_set("maxmemory", limit)
    again = make_job(0, attempt=1)
    admit(table, again)
    check(table, write(table, again))


def test_forbidden_key_names_the_rights_that_are_needed(urls: dict[str, str]) -> None:
    client = connect(urls["tcp"])
    store = RedisChunkStore(client, "elsewhere")
    with pytest.raises(ReplayError, match=r"forbids.*~slipstream:\*"):
        store.read_into(make_job(0), 0, bytearray(10))
    with pytest.raises(ReplayError, match=r"forbids.*~slipstream:\*"), store.writing(make_job(0)) as writer:
        writer.write(0, bytes(10))
    store.close()
    client.close()


def test_refused_login_is_said_as_by_everything_else(urls: dict[str, str]) -> None:
    client = connect(urls["tcp"])
    client.connection_pool.connection_kwargs["password"] = "wrong"
    with pytest.raises(ReplayUnavailableError, match=f"refuses the login.*{PASSWORD_VARIABLE}"):
        RedisChunkStore(client, PREFIX).read_into(make_job(0), 0, bytearray(10))
    client.close()


def test_late_answer_is_not_taken_for_the_next(embedded: EmbeddedRedis, table: RedisTable, client: Client) -> None:
    admit(table, make_job(0))
    sample = write(table, make_job(0))
    hasty_client = connect(embedded.url)
    hasty = RedisTable(hasty_client, PREFIX)
    check(hasty, sample)
    (connection,) = hasty._chunks._connections._idle  # type: ignore[attr-defined]
    connection._socket.settimeout(0.5)
    pid = client.info("server")["process_id"]
    os.kill(pid, signal.SIGSTOP)
    try:
        with pytest.raises(ReplayUnavailableError, match="does not answer: Timeout"):
            hasty.read_into(sample.job, 0, bytearray(sample.chunks[0].num_bytes))
    finally:
        os.kill(pid, signal.SIGCONT)
    patient = connect(embedded.url)
    patient.ping()
    check(RedisTable(patient, PREFIX), sample)
    hasty.close()
    hasty_client.close()
    patient.close()


def kill_redis(client: Client) -> None:
    os.kill(client.info("server")["process_id"], signal.SIGKILL)


def is_back(client: Client) -> bool:
    try:
        return bool(client.ping())
    except ReplayUnavailableError:
        return False


def test_redis_killed_while_it_is_written_to(tmp_path: Path) -> None:
    with EmbeddedRedis.start(tmp_path, CAPACITY_BYTES) as embedded:
        client = connect(embedded.url)
        table = make_table(client)
        admit(table, make_job(0))
        check(table, write(table, make_job(0)))
        job, pid = make_job(1), client.info("server")["process_id"]
        admit(table, job)
        sent = threading.Semaphore(0)

        def write_on() -> None:
            with table.writing(job) as writer:
                writer.write(0, bytes(1000))
                os.kill(pid, signal.SIGSTOP)
                sent.release()
                for index in range(1, 5):
                    writer.write(index, bytes(1024**2))

        with ThreadPoolExecutor(1) as pool:
            writing = pool.submit(write_on)
            assert sent.acquire(timeout=WAIT_S)
            os.kill(pid, signal.SIGKILL)
            with pytest.raises(ReplayUnavailableError, match=r"does not answer: .* Check replay\.redis"):
                writing.result(WAIT_S)
        wait_until(lambda: is_back(client), "the next Redis")
        table.create(CAPACITY_BYTES, SIGNATURE, max_times_sampled=1)
        admit(table, job)
        check(table, write(table, job))
        table.close()
        client.close()


def test_redis_killed_while_it_is_read_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with EmbeddedRedis.start(tmp_path, CAPACITY_BYTES) as embedded:
        client = connect(embedded.url)
        table = make_table(client)
        admit(table, make_job(0))
        sample = write(table, make_job(0))
        receive, num_received = RawConnection._receive, 0

        def receive_and_kill(connection: RawConnection, room: memoryview) -> int:
            nonlocal num_received
            if num_received == 2:
                kill_redis(client)
            num_received += 1
            return receive(connection, room[:1000])

        with monkeypatch.context() as patched:
            patched.setattr(RawConnection, "_receive", receive_and_kill)
            with pytest.raises(ReplayUnavailableError, match="does not answer"):
                table.read_into(sample.job, 0, bytearray(sample.chunks[0].num_bytes))
        assert num_received > 2
        wait_until(lambda: is_back(client), "the next Redis")
        with pytest.raises(UnknownSampleError):
            table.read_into(sample.job, 0, bytearray(sample.chunks[0].num_bytes))
        table.create(CAPACITY_BYTES, SIGNATURE, max_times_sampled=1)
        admit(table, make_job(0))
        check(table, write(table, make_job(0)))
        table.close()
        client.close()
