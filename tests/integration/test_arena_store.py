"""The arena when readers stop or die in mid-copy, when writers are replaced, and when the index is lost."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import redis
from replaying import (
    JOB_BYTES,
    SIGNATURE,
    bytes_of,
    failed,
    get_chunk,
    insert,
    lease,
    make_job,
    make_sample,
    put_chunk,
    store,
)
from waiting import wait_until

from services.contracts import CaptureJob
from services.errors import ReplayError, ReplayUnavailableError, TargetUnavailableError, UnknownSampleError, WireError
from services.replay import arena_store
from services.replay.arena import Arena, ArenaPlace
from services.replay.arena_store import ArenaStore
from services.replay.audit import audit_table, read_snapshot
from services.replay.connect import Client, connect
from services.replay.embedded import EmbeddedRedis
from services.replay.extents import Extent
from services.replay.reader import ReplayReader
from services.replay.rules import Admission
from services.replay.table import RedisTable
from services.replay.urls import with_arena

NUM_SAMPLES = 3
CAPACITY_BYTES = NUM_SAMPLES * JOB_BYTES

READER = """
import signal, sys, os
from services.contracts import CaptureJob
from services.replay.arena import ArenaPlace
from services.replay.arena_store import ArenaStore
from services.replay.connect import connect
from services.errors import UnknownSampleError
url, prefix, place, job = sys.argv[1:]
store = ArenaStore(connect(url), prefix, ArenaPlace.model_validate_json(place))
try:
    with store.reading(CaptureJob.model_validate_json(job)) as reader:
        first, second = bytearray(48), bytearray(8)
        reader.read_into(0, first)
        print("in the middle", flush=True)
        os.kill(os.getpid(), signal.SIGSTOP)
        reader.read_into(1, second)
except UnknownSampleError as error:
    print("refused", bytes(first + second) == bytes([1]) * 48 + bytes([2]) * 8, flush=True)
else:
    print("read", bytes(first + second) == bytes([1]) * 48 + bytes([2]) * 8, flush=True)
"""


class Setup(NamedTuple):
    """A table of three samples, its payloads in an arena of exactly its capacity."""

    client: Client
    place: ArenaPlace
    table: RedisTable

    def audit(self) -> list[str]:
        """Captures are admitted here that never were in the work queue."""
        return [line for line in audit_table(self.client, "run") if "without a job" not in line]

    def fill(self, first: int) -> None:
        """Insert as many samples as the table may hold."""
        for capture in range(first, first + NUM_SAMPLES):
            insert(self.table, make_job(capture))

    def use_all(self, now_s: float = 0.0) -> None:
        """Lease and ack all that is ready."""
        while leases := lease(self.table, now_s=now_s):
            self.table.ack(leases, 0, now_s)


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedRedis]:
    with EmbeddedRedis.start(tmp_path_factory.mktemp("redis"), 1_000_000) as embedded:
        yield embedded


@contextlib.contextmanager
def made_in(client: Client) -> Iterator[Setup]:
    with Arena(CAPACITY_BYTES) as arena:
        table = RedisTable(client, "run", chunks=ArenaStore(client, "run", arena.place))
        table.create(CAPACITY_BYTES, SIGNATURE, max_times_sampled=1)
        yield Setup(client, arena.place, table)
        table.close()
        table.destroy()


@pytest.fixture
def setup(embedded: EmbeddedRedis) -> Iterator[Setup]:
    with made_in(connect(embedded.url)) as setup:
        yield setup


@contextlib.contextmanager
def stopped_reader(setup: Setup, job: CaptureJob) -> Iterator[subprocess.Popen[str]]:
    """A process that is stopped between two chunks of a sample."""
    command = [sys.executable, "-c", READER, setup.client.url, "run", setup.place.model_dump_json()]
    with subprocess.Popen([*command, job.model_dump_json()], stdout=subprocess.PIPE, text=True) as reader:
        try:
            assert reader.stdout is not None
            assert reader.stdout.readline() == "in the middle\n"
            wait_until(lambda: state_of(reader.pid) == "T", lambda: state_of(reader.pid), 120)
            yield reader
        finally:
            reader.kill()


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


class Insertion(threading.Thread):
    """Inserts a sample in the background; what it fails with is kept."""

    def __init__(self, table: RedisTable, job: CaptureJob) -> None:
        super().__init__(daemon=True)
        self._table = table
        self._job = job
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self._table.commit(store(self._table, self._job), 0.0)
        except Exception as error:
            self.error = error


def write_all(table: RedisTable, job: CaptureJob, *payloads: bytes, then: Callable[[], object] = bool) -> None:
    """Store chunks of an attempt; `then` something happens before they are flushed."""
    with table.writing(job) as writer:
        for index, payload in enumerate(payloads):
            writer.write(index, payload)
        then()


def raises(error: Exception) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail


def waits_for_space(setup: Setup, thread: Insertion, told: list[str]) -> None:
    """Wait until the writer has said that it waits."""
    wait_until(lambda: bool(told), lambda: f"nothing was said; alive {thread.is_alive()}, {thread.error}", 120)
    assert thread.is_alive()


@pytest.fixture
def told(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the writer says that it waits for."""
    found: list[str] = []
    monkeypatch.setattr(arena_store, "COMPLAIN_S", 0.05)
    monkeypatch.setattr(setup.table._chunks, "_tell", found.append)
    return found


@pytest.mark.parametrize("ends_by", ["expiry", "generation", "clear"])
def test_reader_that_stops_in_mid_copy_keeps_its_bytes_although_its_lease_ends(
    setup: Setup, told: list[str], ends_by: str
) -> None:
    setup.fill(0)
    (held,) = lease(setup.table)
    with stopped_reader(setup, held.sample.job) as reader:
        if ends_by == "expiry":
            assert setup.table.expire(11.0) == [0]
        elif ends_by == "generation":
            setup.table.set_generation(1)
            setup.table.clear(1)
        else:
            setup.table.clear(0)
        if ends_by == "expiry":
            setup.use_all(12.0)
        assert setup.table.info().resident_bytes == 0, "the accounting has the bytes as free"
        insert(setup.table, make_job(10))
        insert(setup.table, make_job(11))
        job = make_job(12)
        assert setup.table.admit(job, JOB_BYTES, 0.0) is Admission.ADMITTED
        thread = Insertion(setup.table, job)
        thread.start()
        waits_for_space(setup, thread, told)
        assert f"{JOB_BYTES} bytes of freed samples" in told[0]
        reader.send_signal(signal.SIGCONT)
        assert reader.stdout is not None
        assert reader.stdout.readline() == "refused True\n", "what it copied is whole, and is not used"
        thread.join(120)
    assert thread.error is None
    assert get_chunk(setup.table, job, 0) == b"\1" * 48
    assert setup.audit() == []


def test_reader_that_is_killed_in_mid_copy_gives_its_bytes_back(setup: Setup, told: list[str]) -> None:
    setup.fill(0)
    (held,) = lease(setup.table)
    with stopped_reader(setup, held.sample.job) as reader:
        setup.table.expire(11.0)
        setup.use_all(12.0)
        insert(setup.table, make_job(10))
        insert(setup.table, make_job(11))
        job = make_job(12)
        setup.table.admit(job, JOB_BYTES, 0.0)
        thread = Insertion(setup.table, job)
        thread.start()
        waits_for_space(setup, thread, told)
        reader.send_signal(signal.SIGKILL)
        reader.wait()
        thread.join(120)
    assert thread.error is None
    assert get_chunk(setup.table, job, 1) == b"\2" * 8


def test_reader_that_goes_on_in_time_reads_what_it_leased(setup: Setup) -> None:
    setup.fill(0)
    (held,) = lease(setup.table)
    with stopped_reader(setup, held.sample.job) as reader:
        setup.table.expire(11.0)  # the sample itself is still there
        reader.send_signal(signal.SIGCONT)
        assert reader.stdout is not None
        assert reader.stdout.readline() == "read True\n"


def test_writer_that_waits_for_space_gives_up_with_its_capture(setup: Setup, told: list[str]) -> None:
    setup.fill(0)
    (held,) = lease(setup.table)
    with stopped_reader(setup, held.sample.job):
        setup.table.clear(0)
        insert(setup.table, make_job(10))
        insert(setup.table, make_job(11))
        job = make_job(12)
        setup.table.admit(job, JOB_BYTES, 0.0)
        thread = Insertion(setup.table, job)
        thread.start()
        waits_for_space(setup, thread, told)
        assert setup.table.abandon(job, failed(job))
        thread.join(120)
        assert isinstance(thread.error, UnknownSampleError)
        assert setup.audit() == []


def test_writer_that_waits_for_space_ends_with_its_shard(setup: Setup, told: list[str]) -> None:
    setup.fill(0)
    (held,) = lease(setup.table)
    with stopped_reader(setup, held.sample.job):
        setup.table.clear(0)
        for capture in (10, 11):
            insert(setup.table, make_job(capture))
        job = make_job(12)
        setup.table.admit(job, JOB_BYTES, 0.0)
        thread = Insertion(setup.table, job)
        thread.start()
        waits_for_space(setup, thread, told)
        setup.table._chunks._stopping.set()
        thread.join(120)
        assert isinstance(thread.error, ReplayUnavailableError)


def test_chunk_too_many_is_refused_although_the_arena_is_full(setup: Setup) -> None:
    for capture in range(NUM_SAMPLES):
        setup.table.admit(make_job(capture), JOB_BYTES, 0.0)
        store(setup.table, make_job(capture))
    with pytest.raises(WireError, match="brings it to 57 bytes, 56 are reserved"):
        put_chunk(setup.table, make_job(0), 2, bytes(1))


def test_samples_in_pieces_are_read_as_they_were_written(setup: Setup) -> None:
    jobs = [make_job(0, tokens=2), make_job(1, tokens=2), make_job(2, tokens=2)]
    for job in jobs:  # 40 bytes each
        insert(setup.table, job)
    for leased in lease(setup.table, 2, captures=[0, 2]):
        setup.table.ack([leased], 0, 0.0)
    large = make_job(3, tokens=7)
    insert(setup.table, large)
    extents = read_snapshot(setup.client, "run").extents[3]
    assert len(extents) > 2, "it had to be cut"
    assert get_chunk(setup.table, large, 0, 112) == b"\1" * 112
    assert get_chunk(setup.table, large, 1) == b"\2" * 8
    assert get_chunk(setup.table, jobs[1], 0, 32) == b"\1" * 32
    assert setup.table.info().resident_bytes == bytes_of(large) + bytes_of(jobs[1])
    assert setup.audit() == []


def test_shard_that_takes_over_knows_what_is_free(setup: Setup) -> None:
    setup.fill(0)
    (held, *_) = lease(setup.table, 2)
    in_flight = make_job(9)
    setup.table.ack([held], 0, 0.0)  # noted as freed, for a writer that will never look
    setup.table.admit(in_flight, JOB_BYTES, 0.0)
    put_chunk(setup.table, in_flight, 0, bytes(48))
    setup.table.close()
    successor = RedisTable(setup.client, "run", chunks=ArenaStore(setup.client, "run", setup.place))
    again = make_job(9, attempt=1)
    assert successor.admit(again, JOB_BYTES, 0.0) is Admission.ADMITTED
    successor.commit(store(successor, again), 0.0)
    assert [get_chunk(successor, make_job(capture), 0) for capture in (1, 2)] == [b"\1" * 48] * 2
    assert setup.audit() == []
    successor.expire(11.0)
    while leases := lease(successor):
        successor.ack(leases, 0, 0.0)
    for capture in range(20, 20 + NUM_SAMPLES):
        insert(successor, make_job(capture))
    assert setup.audit() == []
    successor.close()


def test_shard_waits_for_the_death_of_the_one_before(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    insert(setup.table, make_job(0))
    successor = RedisTable(setup.client, "run", chunks=ArenaStore(setup.client, "run", setup.place))
    job = make_job(1)
    successor.admit(job, JOB_BYTES, 0.0)
    monkeypatch.setattr(arena_store, "TAKE_OVER_S", 0.0)
    with pytest.raises(ReplayError, match="another replay shard still writes"):
        put_chunk(successor, job, 0, bytes(48))
    setup.table.close()
    put_chunk(successor, job, 0, bytes(48))
    successor.close()


def test_index_that_is_lost_frees_all_but_what_is_being_read(tmp_path: Path) -> None:
    with EmbeddedRedis.start(tmp_path, 1_000_000) as embedded:
        client = connect(embedded.url)
        with made_in(client) as setup:
            setup.fill(0)
            (held,) = lease(setup.table)
            with contextlib.ExitStack() as stack:
                reader = stack.enter_context(setup.table.reading(held.sample.job))
                place = bytearray(48)
                reader.read_into(0, place)
                client.flushall()
                setup.table.create(CAPACITY_BYTES, SIGNATURE, max_times_sampled=1)
                insert(setup.table, make_job(1))
                insert(setup.table, make_job(0))  # the same capture and attempt, somewhere else
                taken = [extent for extents in read_snapshot(client, "run").extents.values() for extent in extents]
                assert all(extent.start >= JOB_BYTES for extent in taken), "what is being read is left alone"
                with pytest.raises(UnknownSampleError):
                    stack.close()
            insert(setup.table, make_job(2))
            assert setup.audit() == []


def test_answer_of_the_index_that_gets_lost_costs_no_byte(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    setup.fill(0)
    setup.use_all()
    job = make_job(5)
    setup.table.admit(job, JOB_BYTES, 0.0)
    plain = redis.Redis.execute_command
    lost: list[str] = []

    def answer_is_lost(self: redis.Redis, *arguments: object, **options: object) -> object:
        answer = plain(self, *arguments, **options)
        if arguments[0] == "EVALSHA" and not lost and b"48" in map(_encoded, arguments):
            lost.append("once")
            raise redis.exceptions.ConnectionError("gone")
        return answer

    monkeypatch.setattr(redis.Redis, "execute_command", answer_is_lost)
    with pytest.raises(ReplayUnavailableError):
        put_chunk(setup.table, job, 0, bytes(48))
    assert lost
    assert setup.audit() == [], "it was recorded all the same"
    again = make_job(5, attempt=1)
    setup.table.admit(again, JOB_BYTES, 0.0)
    setup.table.commit(store(setup.table, again), 0.0)
    for capture in (6, 7):
        insert(setup.table, make_job(capture))
    assert setup.table.info().resident_bytes == CAPACITY_BYTES
    assert setup.audit() == []


def _encoded(argument: object) -> bytes:
    return str(argument).encode()


def test_late_record_of_a_replaced_writer_changes_nothing(setup: Setup) -> None:
    job = make_job(0)
    setup.table.admit(job, JOB_BYTES, 0.0)
    setup.table.close()
    successor = RedisTable(setup.client, "run", chunks=ArenaStore(setup.client, "run", setup.place))
    put_chunk(successor, job, 0, b"a" * 48)
    scripts = setup.table._scripts
    late = ("arena_put", "token of before", job.capture, job.attempt, 1, 8, "0-8")
    assert scripts.run(*late) == ("FENCED", [])
    assert read_snapshot(setup.client, "run").extents[0] == (Extent(0, 48),)
    successor.close()


def test_chunks_of_a_sample_are_recorded_with_one_script(setup: Setup) -> None:
    job = make_job(0)
    setup.table.admit(job, JOB_BYTES, 0.0)
    with setup.table.writing(job) as writer:
        writer.write(0, bytes(48))
        writer.write(1, bytes(4))
        assert setup.client.hget("run:sample:0", "chunks") == b"0", "they are copied, not yet recorded"
        writer.write(1, bytes(8))  # the same chunk again
        assert setup.client.hget("run:sample:0", "chunks") == b"2"
    assert setup.client.hget("run:sample:0", "stored") == b"56"
    setup.table.commit(make_sample(job), 0.0)
    insert(setup.table, make_job(1))
    insert(setup.table, make_job(2))  # the arena holds no more: what was replaced is free
    assert setup.audit() == []


def test_many_small_chunks_are_recorded_as_they_come(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena_store, "MOST_UNRECORDED_CHUNKS", 5)
    monkeypatch.setattr(arena_store, "MOST_UNRECORDED_BYTES", 3)
    job = make_job(0)
    setup.table.admit(job, JOB_BYTES, 0.0)
    with setup.table.writing(job) as writer:
        for index in range(7):  # the first five without a byte
            writer.write(index, bytes(index // 5))
            assert setup.client.hget("run:sample:0", "chunks") == (b"5" if index >= 4 else b"0")
    assert setup.client.hget("run:sample:0", "chunks") == b"7"


def test_chunk_that_is_refused_takes_those_recorded_with_it_along(setup: Setup) -> None:
    job = make_job(0)
    setup.table.admit(job, JOB_BYTES, 0.0)
    with pytest.raises(WireError, match="chunk 1 brings it to 57 bytes, 56 are reserved"):
        write_all(setup.table, job, bytes(48), bytes(9))
    assert setup.client.hget("run:sample:0", "chunks") == b"0"
    again = make_job(0, attempt=1)
    setup.table.admit(again, JOB_BYTES, 0.0)
    setup.table.commit(store(setup.table, again), 0.0)
    for capture in (1, 2):
        insert(setup.table, make_job(capture))
    assert setup.audit() == []


def test_capture_that_breaks_off_gives_back_what_was_only_copied(setup: Setup) -> None:
    job = make_job(0)
    setup.table.admit(job, JOB_BYTES, 0.0)
    with pytest.raises(TargetUnavailableError):
        write_all(setup.table, job, bytes(48), then=raises(TargetUnavailableError("it died")))
    setup.table.abandon(job, failed(job))
    setup.fill(1)
    assert setup.table.info().resident_bytes == CAPACITY_BYTES
    assert setup.audit() == []


def begin_beside_another(setup: Setup) -> CaptureJob:
    """A capture on its way, and another sample that is there."""
    job = make_job(0)
    setup.table.admit(job, JOB_BYTES, 0.0)
    insert(setup.table, make_job(1))
    return job


class AnswerOfAnother:
    """Another thread of the shard loses an answer of the index: whoever needs the token next takes the index over."""

    def __init__(self, setup: Setup) -> None:
        self._owner = setup.table._chunks._writer

    def before(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """It happens whenever the writer comes to this step."""
        step = getattr(self._owner, name)

        def spoilt(*arguments: object) -> object:
            self._owner._token = ""
            if name == "record":
                self._owner._token_for(make_job(0))
            return step(*arguments)

        monkeypatch.setattr(self._owner, name, spoilt)


def test_record_after_the_index_was_taken_over_is_refused_and_frees_once(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = begin_beside_another(setup)
    with pytest.raises(ReplayUnavailableError, match="made again"):
        write_all(setup.table, job, bytes(48), then=lambda: AnswerOfAnother(setup).before("record", monkeypatch))
    monkeypatch.undo()
    again = make_job(0, attempt=1)
    setup.table.admit(again, JOB_BYTES, 0.0)
    setup.table.commit(store(setup.table, again), 0.0)
    insert(setup.table, make_job(2))
    assert setup.audit() == []


def test_index_taken_over_right_before_a_record_leaves_it_its_bytes(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = begin_beside_another(setup)
    AnswerOfAnother(setup).before("hand_over", monkeypatch)
    sample = store(setup.table, job)
    monkeypatch.undo()
    setup.table.commit(sample, 0.0)
    insert(setup.table, make_job(2))
    assert [get_chunk(setup.table, make_job(capture), 0) for capture in range(3)] == [b"\1" * 48] * 3
    assert setup.audit() == [], "no byte was given away twice"


def test_index_taken_over_right_before_a_record_that_is_refused_frees_its_bytes_once(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = begin_beside_another(setup)
    AnswerOfAnother(setup).before("hand_over", monkeypatch)
    with pytest.raises(UnknownSampleError):
        write_all(setup.table, job, bytes(48), then=lambda: setup.table.abandon(job, failed(job)))
    monkeypatch.undo()
    for capture in (2, 3):
        insert(setup.table, make_job(capture))
    assert setup.audit() == []


def test_claims_of_a_record_that_no_index_can_take_are_given_back(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = begin_beside_another(setup)
    owner = setup.table._chunks._writer

    def index_is_lost() -> None:
        setup.client.flushall()
        owner._token = ""

    with pytest.raises(UnknownSampleError):
        write_all(setup.table, job, bytes(48), then=index_is_lost)
    assert owner._space.claimed_bytes == 0
    setup.table.create(CAPACITY_BYTES, SIGNATURE, max_times_sampled=1)
    setup.fill(1)
    assert setup.audit() == []


def test_samples_of_thousands_of_chunks_are_found_again(setup: Setup) -> None:
    num_chunks = 2 * 1000 + 7
    job = make_job(0)
    setup.table.admit(job, JOB_BYTES, 0.0)
    with setup.table.writing(job) as writer:
        for index in range(num_chunks):
            writer.write(index, bytes([index]) if index < JOB_BYTES else b"")
    assert setup.client.hget("run:sample:0", "chunks") == b"%d" % num_chunks
    with setup.table._chunks.reading(job) as reader:
        for index in range(JOB_BYTES):
            place = bytearray(1)
            reader.read_into(index, place)
            assert place == bytes([index])
        reader.read_into(num_chunks - 1, bytearray())


def test_table_larger_than_the_arena_is_refused(setup: Setup) -> None:
    setup.table.create(CAPACITY_BYTES + 1, SIGNATURE, max_times_sampled=1)
    setup.table.admit(make_job(0), JOB_BYTES, 0.0)
    with pytest.raises(ReplayError, match=f"{CAPACITY_BYTES + 1} bytes, its shared-memory arena {CAPACITY_BYTES}"):
        put_chunk(setup.table, make_job(0), 0, bytes(48))


def test_rank_that_cannot_reach_the_arena_says_so_at_once(embedded: EmbeddedRedis) -> None:
    with Arena(CAPACITY_BYTES) as arena:
        url = with_arena(embedded.url, arena.place.text)
        ReplayReader(url, "run", SIGNATURE).close()
    with pytest.raises(ReplayError, match="must be on one host"):
        ReplayReader(url, "run", SIGNATURE)
    client = connect(url)
    RedisTable(client, "run").close()  # who reads no features needs no arena


def test_threads_that_write_read_and_free_never_mix_their_bytes(setup: Setup) -> None:
    """Each sample is filled with its own number; whoever reads another one has a torn or stolen sample."""
    reader = RedisTable(setup.client, "run", chunks=ArenaStore(setup.client, "run", setup.place))
    wrong: list[str] = []
    done = threading.Event()

    def write(first: int) -> None:
        for capture in range(first, first + 150, 2):
            job = make_job(capture)
            while setup.table.admit(job, JOB_BYTES, 0.0) is Admission.FULL:
                done.wait(0.001)
            sample_bytes = bytes([capture % 251]) * 56
            with setup.table.writing(job) as writer:
                writer.write(0, sample_bytes[:48])
                writer.write(1, sample_bytes[48:])
            setup.table.commit(make_sample(job), 0.0)

    def read() -> None:
        seen = 0
        while seen < 150 and not wrong:
            for leased in lease(reader):
                job, place = leased.sample.job, bytearray(48)
                reader.read_into(job, 0, place)
                if bytes(place) != bytes([job.capture % 251]) * 48:
                    wrong.append(f"capture {job.capture} holds {set(place)}")
                reader.ack([leased], 0, 0.0)
                seen += 1

    threads = [threading.Thread(target=write, args=(first,), daemon=True) for first in (0, 1)]
    threads.append(threading.Thread(target=read, daemon=True))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    assert wrong == []
    assert setup.table.info().resident_bytes == 0
    assert setup.audit() == []
    reader.close()
