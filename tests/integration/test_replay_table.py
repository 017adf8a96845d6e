"""The replay table on a real Redis: every transition, and a state machine against a model."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from services.contracts import CaptureJob, Chunk, Outcome, Sample, SampleLease, TableSignature
from services.errors import (
    ReplayError,
    SampleTooLargeError,
    SignatureError,
    StaleGenerationError,
    TableLostError,
    UnknownSampleError,
    WireError,
)
from services.replay.connect import Client, connect
from services.replay.embedded import EmbeddedRedis
from services.replay.registry import TargetRegistry
from services.replay.table import Admission, RedisTable
from services.replay.work import WorkQueue

SIGNATURE = TableSignature(fingerprint="f", layer_ids=(0, 2), hidden_size=4, dtype="bf16")
"""16 bytes a context row, 8 bytes a last row."""


@pytest.fixture(scope="module")
def redis_client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    with EmbeddedRedis.start(tmp_path_factory.mktemp("redis"), 1_000_000) as embedded:
        yield connect(embedded.url)


@pytest.fixture
def table(redis_client: Client) -> Iterator[RedisTable]:
    """Room for 4 samples of 3 tokens and 1 last row (56 bytes each), one use each."""
    table = RedisTable(redis_client, "run")
    table.create(4 * 56, SIGNATURE, max_times_sampled=1)
    yield table
    assert table.info().peak_bytes <= 4 * 56
    table.destroy()
    assert redis_client.keys("run:*") == []


def make_job(
    capture: int, *, tokens: int = 3, attempt: int = 0, reuse: int = 1, ks: tuple[int, ...] | None = None
) -> CaptureJob:
    return CaptureJob(
        capture=capture,
        attempt=attempt,
        prompt=capture + 100,
        epoch=0,
        reuse=reuse,
        input_ids=tuple(range(tokens)),
        loss_mask=(0,) * (tokens - 2) + (1, 1),
        last_rows=(tokens - 2,),
        ks=ks,
    )


def bytes_of(job: CaptureJob) -> int:
    return 16 * job.num_tokens + 8


def make_sample(job: CaptureJob) -> Sample:
    """Two chunks: all context rows, and the one last row."""
    chunks = (
        Chunk(tensor="context", row_start=0, row_end=job.num_tokens, num_bytes=16 * job.num_tokens, crc32c=0),
        Chunk(tensor="last", row_start=0, row_end=1, num_bytes=8, crc32c=0),
    )
    return Sample(job=job, chunks=chunks, num_bytes=bytes_of(job), target="somewhere")


def store(table: RedisTable, job: CaptureJob) -> Sample:
    sample = make_sample(job)
    for index, chunk in enumerate(sample.chunks):
        table.put_chunk(job, index, bytes([index + 1]) * chunk.num_bytes)
    return sample


def insert(table: RedisTable, job: CaptureJob, now_s: float = 0.0) -> Sample:
    assert table.admit(job, bytes_of(job), now_s) is Admission.ADMITTED
    sample = store(table, job)
    table.commit(sample, now_s)
    return sample


def lease(
    table: RedisTable, count: int = 1, *, now_s: float = 0.0, generation: int = 0, captures: list[int] | None = None
) -> list[SampleLease]:
    return table.lease(rank=0, generation=generation, count=count, now_s=now_s, lease_s=10.0, captures=captures)


def captures_of(leases: list[SampleLease]) -> list[int]:
    return [item.sample.job.capture for item in leases]


def chunk_keys(client: Client) -> list[bytes]:
    return sorted(client.keys("run:chunk:*"))


def failed(job: CaptureJob, *, retry: bool = False) -> Outcome:
    return Outcome(capture=job.capture, attempt=job.attempt, kind="failed", retry=retry, reason="because")


# Creation.


def test_same_signature_again_keeps_the_samples(table: RedisTable) -> None:
    insert(table, make_job(0))
    incarnation = table.incarnation()
    table.create(4 * 56, SIGNATURE, max_times_sampled=1)
    assert table.info().num_ready == 1
    assert table.incarnation() == incarnation
    assert table.signature() == SIGNATURE


def test_other_signature_is_refused(table: RedisTable) -> None:
    other = SIGNATURE.model_copy(update={"layer_ids": (0, 3)})
    with pytest.raises(SignatureError, match=r'"layer_ids":\[0,2\].*"layer_ids":\[0,3\]'):
        table.create(4 * 56, other, max_times_sampled=1)


def test_capacity_below_what_is_resident_is_refused(table: RedisTable) -> None:
    insert(table, make_job(0))
    with pytest.raises(ReplayError, match="holds 56 bytes, more than the new capacity of 55"):
        table.create(55, SIGNATURE, max_times_sampled=1)


def test_missing_table_is_said_to_be_lost(redis_client: Client) -> None:
    table = RedisTable(redis_client, "nothing")
    assert (table.signature(), table.incarnation(), table.generation()) == (None, None, None)
    for call in (
        table.info,
        table.seal,
        lambda: table.admit(make_job(0), 56, 0.0),
        lambda: table.commit(make_sample(make_job(0)), 0.0),
        lambda: lease(table),
        lambda: table.ack([], 0, 0.0),
        lambda: table.release([], 0),
        lambda: table.expire(0.0),
        lambda: table.set_generation(1),
    ):
        with pytest.raises(TableLostError, match="nothing"):
            call()
    assert redis_client.keys("nothing*") == []


def test_scripts_come_back_after_redis_forgot_them(table: RedisTable, redis_client: Client) -> None:
    table.info()
    redis_client.script_flush()
    assert table.info().num_ready == 0


# Admission.


def test_bytes_count_from_admission_to_last_ack(table: RedisTable, redis_client: Client) -> None:
    job = make_job(7)
    assert table.admit(job, 56, 1.0) is Admission.ADMITTED
    assert table.info().resident_bytes == 56
    assert table.info().num_inserting == 1
    table.commit(store(table, job), 2.0)
    assert chunk_keys(redis_client) == [b"run:chunk:7:0:0", b"run:chunk:7:0:1"]
    (leased,) = lease(table)
    assert (table.info().resident_bytes, table.info().num_leased) == (56, 1)
    table.ack([leased], 0, 3.0)
    info = table.info()
    assert (info.resident_bytes, info.peak_bytes, info.num_leased, info.num_ready, info.num_inserting) == (
        *(0, 56, 0, 0, 0),
    )
    assert (info.inserts, info.samples, info.deletes) == (1, 1, 1)
    assert chunk_keys(redis_client) == []
    assert redis_client.keys("run:sample:*") == redis_client.keys("run:uses:*") == []


def test_full_table_admits_again_once_a_sample_is_used(table: RedisTable) -> None:
    for capture in range(4):
        insert(table, make_job(capture))
    assert table.admit(make_job(4), 56, 0.0) is Admission.FULL
    assert table.info().resident_bytes == 4 * 56
    table.ack(lease(table), 0, 0.0)
    assert table.admit(make_job(4), 56, 0.0) is Admission.ADMITTED
    assert table.info().peak_bytes == 4 * 56


def test_one_byte_too_many_is_full(redis_client: Client) -> None:
    table = RedisTable(redis_client, "narrow")
    table.create(111, SIGNATURE, max_times_sampled=1)
    assert table.admit(make_job(0), 56, 0.0) is Admission.ADMITTED
    assert table.admit(make_job(1), 56, 0.0) is Admission.FULL
    table.create(112, SIGNATURE, max_times_sampled=1)
    assert table.admit(make_job(1), 56, 0.0) is Admission.ADMITTED
    table.destroy()


def test_captures_in_flight_fill_the_table(table: RedisTable) -> None:
    for capture in range(4):
        assert table.admit(make_job(capture), 56, 0.0) is Admission.ADMITTED
    assert table.admit(make_job(4), 56, 0.0) is Admission.FULL


def test_sample_larger_than_the_table_is_refused(table: RedisTable) -> None:
    job = make_job(0, tokens=14)
    with pytest.raises(SampleTooLargeError, match=r"14 tokens needs 232 bytes.*holds 224.*replay.capacity"):
        table.admit(job, 232, 0.0)
    assert table.info().resident_bytes == 0


def test_more_uses_than_the_table_allows_are_refused(table: RedisTable) -> None:
    with pytest.raises(ReplayError, match="feeds 2 uses, the table allows 1"):
        table.admit(make_job(0, reuse=2), 56, 0.0)
    assert table.admit(make_job(0, reuse=2, ks=(1,)), 56, 0.0) is Admission.ADMITTED


def test_same_attempt_is_known_while_in_flight_and_once_resident(table: RedisTable) -> None:
    job = make_job(0)
    table.admit(job, 56, 0.0)
    assert table.admit(job, 56, 0.0) is Admission.KNOWN
    table.commit(store(table, job), 0.0)
    assert table.admit(job, 56, 0.0) is Admission.KNOWN
    assert table.admit(make_job(0, attempt=5), 56, 0.0) is Admission.KNOWN
    assert table.info().resident_bytes == 56


def test_job_of_a_resident_sample_is_answered_once(table: RedisTable, redis_client: Client) -> None:
    work = WorkQueue(redis_client, "run")
    insert(table, make_job(0))
    table.drain_outcomes()
    work.push(make_job(0, attempt=1))
    job = work.take(0.0, 10.0)
    assert job is not None
    for _ in range(2):
        assert table.admit(job, 56, 0.0) is Admission.KNOWN
    (outcome,) = table.drain_outcomes()
    assert (outcome.kind, outcome.attempt, outcome.reason) == ("committed", 1, "already resident")
    assert work.done(job) is False


def test_newer_attempt_takes_over_the_space_of_a_full_table(table: RedisTable, redis_client: Client) -> None:
    for capture in range(4):
        table.admit(make_job(capture), 56, 0.0)
    old, new = make_job(0), make_job(0, attempt=1)
    table.put_chunk(old, 0, bytes(48))
    assert table.admit(new, 56, 0.0) is Admission.ADMITTED
    assert chunk_keys(redis_client) == []
    assert (table.info().resident_bytes, table.info().num_inserting) == (4 * 56, 4)
    with pytest.raises(UnknownSampleError, match=r"attempt 0 of capture 0 .* inserting with attempt 1"):
        table.put_chunk(old, 0, bytes(48))
    with pytest.raises(UnknownSampleError, match="attempt 0"):
        table.commit(make_sample(old), 0.0)
    assert table.abandon(old, failed(old)) is False
    assert table.admit(old, 56, 0.0) is Admission.KNOWN
    table.commit(store(table, new), 0.0)
    assert lease(table)[0].sample.job.attempt == 1
    assert [outcome.attempt for outcome in table.drain_outcomes()] == [1]


def test_takeover_of_another_size_is_counted_anew(table: RedisTable) -> None:
    table.admit(make_job(0), 56, 0.0)
    assert table.admit(make_job(0, attempt=1, tokens=12), 200, 0.0) is Admission.ADMITTED
    assert table.info().resident_bytes == 200
    table.admit(make_job(1, tokens=1), 24, 0.0)
    assert table.admit(make_job(1, attempt=1, tokens=2), 40, 0.0) is Admission.FULL
    assert (table.info().resident_bytes, table.info().num_inserting) == (200, 1)


# Chunks and commit.


def test_payload_of_a_freed_capture_leaves_nothing_behind(
    table: RedisTable, redis_client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(0)
    table.admit(job, 56, 0.0)
    plain_set = redis_client.set

    def abandoned_before_set(*args: object, **options: object) -> object:
        table.abandon(job, failed(job))
        return plain_set(*args, **options)

    monkeypatch.setattr(redis_client, "set", abandoned_before_set)
    with pytest.raises(UnknownSampleError, match="abandoned"):
        table.put_chunk(job, 0, bytes(48))
    assert chunk_keys(redis_client) == []
    assert table.info().resident_bytes == 0


def test_more_bytes_than_reserved_are_refused(table: RedisTable, redis_client: Client) -> None:
    job = make_job(0)
    table.admit(job, 56, 0.0)
    table.put_chunk(job, 0, bytes(48))
    with pytest.raises(WireError, match="chunk 1 brings it to 57 bytes, 56 are reserved"):
        table.put_chunk(job, 1, bytes(9))
    assert chunk_keys(redis_client) == [b"run:chunk:0:0:0"]


def test_same_chunk_again_replaces_the_first(table: RedisTable, redis_client: Client) -> None:
    job = make_job(0)
    table.admit(job, 56, 0.0)
    table.put_chunk(job, 0, b"a" * 48)
    table.put_chunk(job, 0, memoryview(b"b" * 48))
    table.put_chunk(job, 1, bytearray(8))
    table.commit(make_sample(job), 0.0)
    assert redis_client.get("run:chunk:0:0:0") == b"b" * 48


def test_chunk_out_of_order_is_refused(table: RedisTable) -> None:
    job = make_job(0)
    table.admit(job, 56, 0.0)
    with pytest.raises(WireError, match="chunk 1 came where chunk 0 was due"):
        table.put_chunk(job, 1, bytes(8))


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ([], "0 chunks are stored, 2 were to be committed"),
        ([48], "1 chunks are stored, 2 were to be committed"),
        ([48, 7], "chunk 1 has 7 bytes in Redis, 8 were sent"),
        ([40, 8], "chunk 0 has 40 bytes in Redis, 48 were sent"),
    ],
)
def test_incomplete_sample_is_not_committed(table: RedisTable, stored: list[int], message: str) -> None:
    job = make_job(0)
    table.admit(job, 56, 0.0)
    for index, num_bytes in enumerate(stored):
        table.put_chunk(job, index, bytes(num_bytes))
    with pytest.raises(WireError, match=message):
        table.commit(make_sample(job), 0.0)
    assert lease(table) == []
    assert table.drain_outcomes() == []
    assert table.info().num_inserting == 1


def test_commit_of_more_bytes_than_arrived_is_refused(table: RedisTable) -> None:
    job = make_job(0, tokens=4)
    table.admit(job, 80, 0.0)
    store(table, job)
    with pytest.raises(WireError, match="72 bytes were to be committed, 80 are reserved"):
        table.commit(make_sample(job).model_copy(update={"num_bytes": 80}), 0.0)


def test_commit_gives_back_what_was_reserved_for_a_longer_answer(table: RedisTable) -> None:
    job = make_job(0, tokens=4)
    table.admit(job, 80, 0.0)
    store(table, job)
    assert table.info().resident_bytes == 80
    table.commit(make_sample(job), 0.0)
    assert (table.info().resident_bytes, table.info().peak_bytes) == (72, 80)
    (leased,) = lease(table)
    table.ack([leased], 0, 1.0)
    assert table.info().resident_bytes == 0


def test_commit_again_changes_nothing(table: RedisTable) -> None:
    sample = insert(table, make_job(0))
    table.commit(sample, 5.0)
    assert len(table.drain_outcomes()) == 1
    assert (table.info().inserts, table.info().num_ready) == (1, 1)


def test_commit_without_admission_is_refused(table: RedisTable) -> None:
    with pytest.raises(UnknownSampleError, match="abandoned or never admitted"):
        table.commit(make_sample(make_job(0)), 0.0)


def test_commit_writes_the_outcome_and_ends_the_job(table: RedisTable, redis_client: Client) -> None:
    work = WorkQueue(redis_client, "run")
    work.push(make_job(3))
    job = work.take(0.0, 10.0)
    assert job is not None
    insert(table, job)
    assert table.drain_outcomes() == [
        Outcome(capture=3, attempt=0, kind="committed", num_tokens=3, num_bytes=56),
    ]
    assert table.drain_outcomes() == []
    assert work.expire(1e9) == []
    assert work.take(0.0, 10.0) is None


def test_many_outcomes_are_drained_in_order(table: RedisTable) -> None:
    for capture in range(1203):
        job = make_job(capture)
        table.admit(job, 56, 0.0)
        assert table.abandon(job, failed(job))
    assert [outcome.capture for outcome in table.drain_outcomes()] == list(range(1203))


def test_abandoned_capture_frees_its_bytes_once(table: RedisTable, redis_client: Client) -> None:
    job = make_job(0)
    table.admit(job, 56, 0.0)
    table.put_chunk(job, 0, bytes(48))
    assert table.abandon(job, failed(job, retry=True)) is True
    assert table.abandon(job, failed(job, retry=True)) is False
    assert table.drain_outcomes() == [failed(job, retry=True)]
    assert (table.info().resident_bytes, table.info().num_inserting) == (0, 0)
    assert chunk_keys(redis_client) == []
    assert table.admit(job, 56, 0.0) is Admission.ADMITTED


def test_committed_sample_cannot_be_abandoned(table: RedisTable) -> None:
    job = make_job(0)
    insert(table, job)
    table.drain_outcomes()
    assert table.abandon(job, failed(job)) is False
    assert table.drain_outcomes() == []
    assert table.info().num_ready == 1


def test_job_that_was_never_admitted_can_be_abandoned(table: RedisTable, redis_client: Client) -> None:
    work = WorkQueue(redis_client, "run")
    work.push(make_job(0))
    job = work.take(0.0, 10.0)
    assert job is not None
    assert table.abandon(job, failed(job)) is True
    assert table.drain_outcomes() == [failed(job)]
    assert work.done(job) is False


# Leases.


def test_leases_are_in_order_of_commit(table: RedisTable) -> None:
    jobs = [make_job(capture) for capture in (5, 3, 4)]
    for job in jobs:
        table.admit(job, 56, 0.0)
    for job in (jobs[1], jobs[0], jobs[2]):
        table.commit(store(table, job), 0.0)
    assert captures_of(lease(table, 3)) == [3, 5, 4]


def test_lease_is_empty_until_so_many_are_ready(table: RedisTable) -> None:
    insert(table, make_job(0))
    assert lease(table, 2) == []
    assert (table.info().samples, table.info().num_leased) == (0, 0)
    insert(table, make_job(1))
    assert captures_of(lease(table, 2)) == [0, 1]


def test_sealed_table_gives_the_rest(table: RedisTable) -> None:
    insert(table, make_job(0))
    table.seal()
    assert table.info().sealed
    assert captures_of(lease(table, 2)) == [0]
    assert lease(table, 2) == []


def test_lease_carries_the_sample_and_its_use(redis_client: Client) -> None:
    table = RedisTable(redis_client, "run")
    table.create(1000, SIGNATURE, max_times_sampled=3)
    sample = insert(table, make_job(4, reuse=3))
    leases = [lease(table)[0] for _ in range(3)]
    assert [(item.use, item.k) for item in leases] == [(12, 0), (13, 1), (14, 2)]
    assert all(item.sample == sample for item in leases)
    assert len({item.lease_id for item in leases}) == 3
    assert lease(table) == []
    for item, left in zip(leases, (56, 56, 0), strict=True):
        table.ack([item], 0, 0.0)
        assert table.info().resident_bytes == left
    table.destroy()


def test_reused_sample_goes_to_the_end_of_the_line(redis_client: Client) -> None:
    table = RedisTable(redis_client, "run")
    table.create(1000, SIGNATURE, max_times_sampled=2)
    for capture in range(3):
        insert(table, make_job(capture, reuse=2))
    assert [(item.sample.job.capture, item.k) for item in lease(table, 6)] == [
        *((0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1)),
    ]
    table.destroy()


def test_job_feeds_only_the_uses_it_names(redis_client: Client) -> None:
    table = RedisTable(redis_client, "run")
    table.create(1000, SIGNATURE, max_times_sampled=3)
    insert(table, make_job(2, reuse=3, ks=(2, 1)))
    leases = lease(table, 2)
    assert [(item.use, item.k) for item in leases] == [(7, 1), (8, 2)]
    table.ack(leases, 0, 0.0)
    assert table.info().resident_bytes == 0
    table.destroy()


def test_named_captures_are_leased_together_in_their_order(table: RedisTable) -> None:
    for capture in (0, 1, 2):
        insert(table, make_job(capture))
    assert lease(table, captures=[2, 3]) == []
    assert table.info().num_leased == 0
    insert(table, make_job(3))
    assert captures_of(lease(table, captures=[3, 0])) == [3, 0]
    assert lease(table, captures=[0, 1]) == []
    assert lease(table, captures=[]) == []
    assert captures_of(lease(table, 2)) == [1, 2]


def test_capture_named_twice_needs_two_uses(redis_client: Client) -> None:
    table = RedisTable(redis_client, "run")
    table.create(1000, SIGNATURE, max_times_sampled=2)
    insert(table, make_job(0, reuse=2))
    assert lease(table, captures=[0, 0, 0]) == []
    assert [item.k for item in lease(table, captures=[0, 0])] == [0, 1]
    table.destroy()


def test_replayed_ack_changes_nothing(table: RedisTable) -> None:
    insert(table, make_job(0))
    insert(table, make_job(1))
    first, second = lease(table, 2)
    table.ack([first], 0, 0.0)
    with pytest.raises(UnknownSampleError, match=first.lease_id):
        table.ack([second, first], 0, 0.0)
    assert table.info().num_leased == 1
    with pytest.raises(UnknownSampleError, match="named twice"):
        table.ack([second, second], 0, 0.0)
    table.ack([second], 0, 0.0)
    assert table.info().resident_bytes == 0


def test_released_use_is_ready_again_in_its_old_place(table: RedisTable) -> None:
    for capture in range(3):
        insert(table, make_job(capture))
    leases = lease(table, 2)
    table.release(leases, 0)
    assert captures_of(lease(table, 3)) == [0, 1, 2]
    with pytest.raises(UnknownSampleError, match="not held"):
        table.release(leases, 0)


def test_overdue_lease_is_refused_and_its_use_ready_again(table: RedisTable) -> None:
    insert(table, make_job(0))
    (leased,) = lease(table, now_s=100.5)
    assert table.expire(110.5) == []
    with pytest.raises(UnknownSampleError, match=r"ended 0.5 s before its ack.*replay.lease_s"):
        table.ack([leased], 0, 111.0)
    assert table.expire(111.0) == [0]
    with pytest.raises(UnknownSampleError, match="past its deadline"):
        table.ack([leased], 0, 105.0)
    (again,) = lease(table, now_s=111.0)
    assert (again.use, again.sample) == (leased.use, leased.sample)
    table.ack([again], 0, 121.0)
    assert table.info().resident_bytes == 0


# Generations.


def test_older_generation_is_refused_everywhere(table: RedisTable) -> None:
    insert(table, make_job(0))
    (leased,) = lease(table)
    table.set_generation(2)
    table.set_generation(2)
    assert table.generation() == 2
    for call in (
        lambda: lease(table, generation=1),
        lambda: lease(table, generation=3),
        lambda: table.ack([leased], 0, 0.0),
        lambda: table.release([leased], 0),
        lambda: table.set_generation(1),
    ):
        with pytest.raises(StaleGenerationError, match="not the current one of the replay table 'run', 2"):
            call()
    with pytest.raises(UnknownSampleError):
        table.ack([leased], 2, 0.0)
    assert captures_of(lease(table, generation=2)) == [0]


def test_new_generation_gets_whole_samples_and_recaptures_the_others(redis_client: Client) -> None:
    table = RedisTable(redis_client, "run")
    table.create(1000, SIGNATURE, max_times_sampled=2)
    for capture in range(4):
        insert(table, make_job(capture, reuse=2))
    in_flight = make_job(9, reuse=2)
    table.admit(in_flight, 56, 0.0)
    leases = lease(table, 6)  # 0, 1, 2, 3, then 0 and 1 again
    table.ack([leases[0], leases[2], leases[4]], 0, 0.0)  # both uses of 0, one of 2
    table.seal()
    table.drain_outcomes()
    table.set_generation(1)
    assert table.drain_outcomes() == [
        Outcome(capture=2, attempt=0, kind="failed", retry=True, reason="partly used when generation 1 began"),
    ]
    info = table.info()
    assert (info.num_ready, info.num_leased, info.num_inserting, info.resident_bytes) == (2, 0, 1, 3 * 56)
    assert not info.sealed
    assert [(item.sample.job.capture, item.k) for item in lease(table, 4, generation=1)] == [
        *((1, 0), (3, 0), (1, 1), (3, 1)),
    ]
    table.commit(store(table, in_flight), 0.0)
    assert captures_of(lease(table, generation=1)) == [9]
    table.destroy()


def test_lease_of_a_lost_table_is_unknown_to_the_new_one(table: RedisTable) -> None:
    insert(table, make_job(0))
    (old,) = lease(table)
    incarnation = table.incarnation()
    table.destroy()
    table.create(4 * 56, SIGNATURE, max_times_sampled=1)
    assert table.incarnation() != incarnation
    insert(table, make_job(0))
    (new,) = lease(table)
    with pytest.raises(UnknownSampleError):
        table.ack([old], 0, 0.0)
    table.ack([new], 0, 0.0)


# Work queue and registry.


def test_jobs_come_in_order_and_whole(table: RedisTable, redis_client: Client) -> None:
    work = WorkQueue(redis_client, "run")
    jobs = [make_job(capture).model_copy(update={"last_rows": ()}) for capture in (2, 0, 1)]
    assert [work.push(job) for job in jobs] == [True] * 3
    assert work.push(jobs[0]) is False
    assert work.size() == 3
    assert [work.take(0.0, 10.0) for _ in range(4)] == [*jobs, None]
    assert work.push(jobs[1]) is False
    assert work.size() == 0
    assert work.done(jobs[1]) is True
    assert work.done(jobs[1]) is False
    assert work.push(jobs[1]) is True
    assert work.take(0.0, 10.0) == jobs[1]


def test_newer_attempt_replaces_a_waiting_one_in_place(table: RedisTable, redis_client: Client) -> None:
    work = WorkQueue(redis_client, "run")
    for capture in (0, 1):
        work.push(make_job(capture))
    assert work.push(make_job(0, attempt=3)) is True
    assert work.take(0.0, 1.0) == make_job(0, attempt=3)
    assert work.take(0.0, 1.0) == make_job(1)


def test_ended_job_that_waits_twice_is_taken_once(table: RedisTable, redis_client: Client) -> None:
    work = WorkQueue(redis_client, "run")
    work.push(make_job(0))
    work.done(make_job(0))
    work.push(make_job(0))
    assert work.take(0.0, 1.0) == make_job(0)
    assert work.take(0.0, 1.0) is None


def test_overdue_jobs_return_in_plan_order_with_their_next_attempt(table: RedisTable, redis_client: Client) -> None:
    work = WorkQueue(redis_client, "run")
    for capture in range(12):
        work.push(make_job(capture))
    for _ in range(11):
        work.take(100.0, 10.0)
    assert work.renew(make_job(3, attempt=4), 105.0, 10.0) is True
    assert work.expire(110.0) == []
    assert sorted(work.expire(110.1)) == [0, 1, 2, *range(4, 11)]
    assert work.expire(115.1) == [3]
    taken = [work.take(0.0, 1.0) for _ in range(12)]
    assert [(job.capture, job.attempt) for job in taken if job] == [
        (3, 5),
        *((capture, 1) for capture in (0, 1, 2, *range(4, 11))),
        (11, 0),
    ]


def test_given_back_job_is_the_next_one_taken(table: RedisTable, redis_client: Client) -> None:
    work = WorkQueue(redis_client, "run")
    for capture in (0, 1):
        work.push(make_job(capture))
    work.take(0.0, 1.0)
    assert work.give_back(make_job(0)) is True
    assert work.give_back(make_job(0)) is False
    assert work.renew(make_job(0), 0.0, 1.0) is False
    assert work.take(0.0, 1.0) == make_job(0, attempt=1)
    assert work.give_back(make_job(0)) is False  # the older attempt is not what is taken


def test_registry_forgets_targets_that_are_not_published_again(table: RedisTable, redis_client: Client) -> None:
    registry = TargetRegistry(redis_client, "run")
    assert registry.live(0.0, 1e9) == []
    registry.publish(["b:2", "a:1"], 100.0)
    assert registry.live(104.0, 5.0) == ["a:1", "b:2"]
    assert registry.live(106.0, 5.0) == []
    registry.publish(["b:2"], 105.0)
    assert registry.live(106.0, 1e9) == ["b:2"]
    registry.publish([], 106.0)
    assert registry.live(106.0, 1e9) == []


# The state machine.

REUSE = 2
CAPACITY_BYTES = 200


class ModelSample:
    """What the model remembers of one capture."""

    def __init__(self, job: CaptureJob, order: int) -> None:
        self.job = job
        self.committed = False
        self.order = order
        self.uses = set(range(REUSE))
        self.unacked = REUSE


class TableMachine(RuleBasedStateMachine):
    """Random transitions on a real table beside a model in plain Python."""

    client: Client
    numbers = itertools.count()

    def __init__(self) -> None:
        super().__init__()
        self.prefix = f"machine{next(self.numbers)}"
        self.table = RedisTable(self.client, self.prefix)
        self.table.create(CAPACITY_BYTES, SIGNATURE, max_times_sampled=REUSE)
        self.samples: dict[int, ModelSample] = {}
        self.ready: list[int] = []
        self.leases: dict[str, tuple[SampleLease, float]] = {}
        self.ended: list[SampleLease] = []
        self.next_capture = 0
        self.order = itertools.count()
        self.now_s = 1000.0
        self.generation = 0
        self.peak_bytes = 0
        self.outcomes: list[tuple[int, int, str]] = []
        self.acked: Counter[int] = Counter()
        self.freed: list[int] = []

    def teardown(self) -> None:
        self.table.destroy()
        assert self.client.keys(f"{self.prefix}:*") == []

    def resident(self) -> int:
        return sum(bytes_of(sample.job) for sample in self.samples.values())

    def inserting(self) -> list[int]:
        return [capture for capture, sample in self.samples.items() if not sample.committed]

    def put_back(self, held: SampleLease) -> None:
        capture = held.sample.job.capture
        sample = self.samples[capture]
        sample.uses.add(held.k)
        if capture not in self.ready:
            self.insert_by_order(capture)
        del self.leases[held.lease_id]
        self.ended.append(held)

    def insert_by_order(self, capture: int) -> None:
        # A sample that returns stands where it stood when it was committed; one that was leased stands behind.
        places = [self.place[other] for other in self.ready]
        self.place[capture] = self.samples[capture].order
        position = sum(place < self.place[capture] for place in places)
        self.ready.insert(position, capture)

    @property
    def place(self) -> dict[int, int]:
        return self.__dict__.setdefault("_place", {})

    @rule(tokens=st.integers(2, 6))
    def admit_new(self, tokens: int) -> None:
        job = make_job(self.next_capture, tokens=tokens, reuse=REUSE)
        answer = self.table.admit(job, bytes_of(job), self.now_s)
        if self.resident() + bytes_of(job) > CAPACITY_BYTES:
            assert answer is Admission.FULL
            return
        assert answer is Admission.ADMITTED
        self.next_capture += 1
        self.samples[job.capture] = ModelSample(job, -1)
        self.peak_bytes = max(self.peak_bytes, self.resident())

    @precondition(lambda self: self.samples)
    @rule(data=st.data())
    def admit_again(self, data: st.DataObject) -> None:
        job = self.samples[data.draw(st.sampled_from(sorted(self.samples)))].job
        assert self.table.admit(job, bytes_of(job), self.now_s) is Admission.KNOWN

    @precondition(lambda self: self.inserting())
    @rule(data=st.data())
    def retry(self, data: st.DataObject) -> None:
        sample = self.samples[data.draw(st.sampled_from(self.inserting()))]
        old = sample.job
        sample.job = old.model_copy(update={"attempt": old.attempt + 1})
        assert self.table.admit(sample.job, bytes_of(old), self.now_s) is Admission.ADMITTED
        with pytest.raises(UnknownSampleError):
            self.table.commit(make_sample(old), self.now_s)

    @precondition(lambda self: self.inserting())
    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        capture = data.draw(st.sampled_from(self.inserting()))
        sample = self.samples[capture]
        with pytest.raises(WireError):
            self.table.commit(make_sample(sample.job), self.now_s)
        stored = store(self.table, sample.job)
        for _ in range(2):
            self.table.commit(stored, self.now_s)
        sample.committed = True
        sample.order = self.place[capture] = next(self.order)
        self.ready.append(capture)
        self.outcomes.append((capture, sample.job.attempt, "committed"))

    @precondition(lambda self: self.inserting())
    @rule(data=st.data())
    def abandon(self, data: st.DataObject) -> None:
        capture = data.draw(st.sampled_from(self.inserting()))
        job = self.samples.pop(capture).job
        assert self.table.abandon(job, failed(job)) is True
        assert self.table.abandon(job, failed(job)) is False
        self.outcomes.append((capture, job.attempt, "failed"))

    @rule(count=st.integers(1, 3))
    def lease(self, count: int) -> None:
        leases = self.table.lease(rank=1, generation=self.generation, count=count, now_s=self.now_s, lease_s=10.0)
        if sum(len(self.samples[capture].uses) for capture in self.ready) < count:
            assert leases == []
            return
        expected = []
        for _ in range(count):
            capture = self.ready.pop(0)
            k = min(self.samples[capture].uses)
            self.samples[capture].uses.remove(k)
            expected.append((capture, k))
            if self.samples[capture].uses:
                self.place[capture] = next(self.order)
                self.ready.append(capture)
        assert [(item.sample.job.capture, item.k) for item in leases] == expected
        for item in leases:
            assert item.lease_id not in self.leases
            self.leases[item.lease_id] = (item, self.now_s + 10.0)

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def ack(self, data: st.DataObject) -> None:
        held, deadline = self.leases[data.draw(st.sampled_from(sorted(self.leases)))]
        if self.now_s > deadline:
            with pytest.raises(UnknownSampleError):
                self.table.ack([held], self.generation, self.now_s)
            return
        self.table.ack([held], self.generation, self.now_s)
        del self.leases[held.lease_id]
        self.ended.append(held)
        self.acked[held.use] += 1
        sample = self.samples[held.sample.job.capture]
        sample.unacked -= 1
        if sample.unacked == 0:
            del self.samples[held.sample.job.capture]
            self.freed.append(held.sample.job.capture)

    @precondition(lambda self: self.ended)
    @rule(data=st.data())
    def ack_again(self, data: st.DataObject) -> None:
        with pytest.raises(UnknownSampleError):
            self.table.ack([data.draw(st.sampled_from(self.ended))], self.generation, self.now_s)

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        held, _ = self.leases[data.draw(st.sampled_from(sorted(self.leases)))]
        self.table.release([held], self.generation)
        self.put_back(held)

    @rule(seconds=st.integers(0, 12))
    def pass_time_and_expire(self, seconds: int) -> None:
        self.now_s += seconds
        overdue = [held for held, deadline in self.leases.values() if deadline < self.now_s]
        assert sorted(self.table.expire(self.now_s)) == sorted(held.sample.job.capture for held in overdue)
        for held in overdue:
            self.put_back(held)

    @rule()
    def begin_generation(self) -> None:
        self.generation += 1
        self.table.set_generation(self.generation)
        for held, _ in list(self.leases.values()):
            self.put_back(held)
        for capture, sample in list(self.samples.items()):
            if sample.committed and sample.unacked < REUSE:
                del self.samples[capture]
                self.outcomes.append((capture, sample.job.attempt, "failed"))
                for k in range(REUSE):  # the new group's ledger counts afresh
                    self.acked.pop(capture * REUSE + k, None)
        for capture, sample in self.samples.items():
            self.place[capture] = sample.order
        self.ready = sorted(
            (capture for capture, sample in self.samples.items() if sample.committed), key=self.place.__getitem__
        )

    @invariant()
    def table_is_as_the_model_says(self) -> None:
        info = self.table.info()
        assert info.resident_bytes == self.resident() <= CAPACITY_BYTES
        assert info.peak_bytes == self.peak_bytes <= CAPACITY_BYTES
        assert (info.num_ready, info.num_leased, info.num_inserting) == (
            *(len(self.ready), len(self.leases), len(self.inserting())),
        )
        stored = sum(self.client.strlen(key) for key in self.client.keys(f"{self.prefix}:chunk:*"))
        assert stored == sum(bytes_of(sample.job) for sample in self.samples.values() if sample.committed)

    @invariant()
    def each_use_is_trained_once_and_freed_samples_were_used_up(self) -> None:
        assert all(count == 1 for count in self.acked.values())
        for capture in self.freed:
            for k in range(REUSE):
                assert self.acked[capture * REUSE + k] == 1

    @invariant()
    def outcomes_tell_every_end_once(self) -> None:
        told = [(outcome.capture, outcome.attempt, outcome.kind) for outcome in self.table.drain_outcomes()]
        assert sorted(told) == sorted(self.outcomes)
        self.outcomes = []


def test_table_behaves_like_its_model(redis_client: Client) -> None:
    from hypothesis.stateful import run_state_machine_as_test

    TableMachine.client = redis_client
    run_state_machine_as_test(
        TableMachine,
        settings=settings(
            max_examples=50, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
        ),
    )
