"""What every replay table does, transition by transition: the one in Redis and the one in memory."""

from __future__ import annotations

import pytest
from replaying import (
    JOB_BYTES,
    SIGNATURE,
    MakeReplay,
    captures_of,
    failed,
    get_chunk,
    insert,
    lease,
    make_job,
    make_sample,
    put_chunk,
    store,
)

from services.contracts import Outcome
from services.errors import (
    ReplayError,
    SampleTooLargeError,
    SignatureError,
    StaleGenerationError,
    TableLostError,
    UnknownSampleError,
    WireError,
)
from services.replay.protocol import CaptureQueue, ReplayTable
from services.replay.rules import Admission


@pytest.fixture
def roomy(make_replay: MakeReplay) -> ReplayTable:
    """Room for many samples, three uses each at most."""
    table = make_replay().table
    table.create(1000, SIGNATURE, max_times_sampled=3)
    return table


# Creation.


def test_same_signature_again_keeps_the_samples(table: ReplayTable) -> None:
    insert(table, make_job(0))
    incarnation = table.incarnation()
    table.create(4 * 56, SIGNATURE, max_times_sampled=1)
    assert table.info().num_ready == 1
    assert table.incarnation() == incarnation
    assert table.signature() == SIGNATURE


def test_table_of_another_wire_dtype_is_refused(table: ReplayTable) -> None:
    other = SIGNATURE.model_copy(update={"dtype": "fp8_e4m3"})
    with pytest.raises(SignatureError, match=r"\(dtype fp8_e4m3, not bf16\). Give this run another name"):
        table.create(4 * 56, other, max_times_sampled=1)


def test_other_signature_is_refused(table: ReplayTable) -> None:
    other = SIGNATURE.model_copy(update={"layer_ids": (0, 3)})
    with pytest.raises(SignatureError, match=r'"layer_ids":\[0,2\].*"layer_ids":\[0,3\]'):
        table.create(4 * 56, other, max_times_sampled=1)


def test_capacity_below_what_is_resident_is_refused(table: ReplayTable) -> None:
    insert(table, make_job(0))
    with pytest.raises(ReplayError, match="holds 56 bytes, more than the new capacity of 55"):
        table.create(55, SIGNATURE, max_times_sampled=1)


def test_missing_table_is_said_to_be_lost(make_replay: MakeReplay) -> None:
    table = make_replay().table
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
        lambda: table.update_priorities({0: 0.5}),
    ):
        with pytest.raises(TableLostError, match="prefix 'run'"):
            call()
    assert table.abandon(make_job(0), failed(make_job(0))) is False
    assert (table.drain_outcomes(), get_chunk(table, make_job(0), 0)) == ([], None)


# Admission.


def test_bytes_count_from_admission_to_last_ack(table: ReplayTable) -> None:
    job = make_job(7)
    assert table.admit(job, 56, 1.0) is Admission.ADMITTED
    assert table.info().resident_bytes == 56
    assert table.info().num_inserting == 1
    table.commit(store(table, job), 2.0)
    stored = [get_chunk(table, job, index) for index in range(3)]
    assert stored == [b"\1" * 48, b"\2" * 8, None]
    (leased,) = lease(table)
    assert (table.info().resident_bytes, table.info().num_leased) == (56, 1)
    table.ack([leased], 0, 3.0)
    info = table.info()
    assert (info.resident_bytes, info.peak_bytes, info.num_leased, info.num_ready, info.num_inserting) == (
        *(0, 56, 0, 0, 0),
    )
    assert (info.inserts, info.samples, info.deletes) == (1, 1, 1)
    assert get_chunk(table, job, 0) is None


def test_full_table_admits_again_once_a_sample_is_used(table: ReplayTable) -> None:
    for capture in range(4):
        insert(table, make_job(capture))
    assert table.admit(make_job(4), 56, 0.0) is Admission.FULL
    assert table.info().resident_bytes == 4 * 56
    table.ack(lease(table), 0, 0.0)
    assert table.admit(make_job(4), 56, 0.0) is Admission.ADMITTED
    assert table.info().peak_bytes == 4 * 56


def test_one_byte_too_many_is_full(make_replay: MakeReplay) -> None:
    table = make_replay().table
    table.create(111, SIGNATURE, max_times_sampled=1)
    assert table.admit(make_job(0), 56, 0.0) is Admission.ADMITTED
    assert table.admit(make_job(1), 56, 0.0) is Admission.FULL
    table.create(112, SIGNATURE, max_times_sampled=1)
    assert table.admit(make_job(1), 56, 0.0) is Admission.ADMITTED


def test_captures_in_flight_fill_the_table(table: ReplayTable) -> None:
    for capture in range(4):
        assert table.admit(make_job(capture), 56, 0.0) is Admission.ADMITTED
    assert table.admit(make_job(4), 56, 0.0) is Admission.FULL


def test_sample_larger_than_the_table_is_refused(table: ReplayTable) -> None:
    job = make_job(0, tokens=14)
    with pytest.raises(SampleTooLargeError, match=r"14 tokens needs 232 bytes.*holds 224.*replay.capacity"):
        table.admit(job, 232, 0.0)
    assert table.info().resident_bytes == 0


def test_more_uses_than_the_table_allows_are_refused(table: ReplayTable) -> None:
    with pytest.raises(ReplayError, match="feeds 2 uses, the table allows 1"):
        table.admit(make_job(0, reuse=2), 56, 0.0)
    assert table.admit(make_job(0, reuse=2, ks=(1,)), 56, 0.0) is Admission.ADMITTED


def test_same_attempt_is_known_while_in_flight_and_once_resident(table: ReplayTable) -> None:
    job = make_job(0)
    table.admit(job, 56, 0.0)
    assert table.admit(job, 56, 0.0) is Admission.KNOWN
    table.commit(store(table, job), 0.0)
    assert table.admit(job, 56, 0.0) is Admission.KNOWN
    assert table.admit(make_job(0, attempt=5), 56, 0.0) is Admission.KNOWN
    assert table.info().resident_bytes == 56


def test_job_of_a_resident_sample_is_answered_once(table: ReplayTable, work: CaptureQueue) -> None:
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


def test_newer_attempt_takes_over_the_space_of_a_full_table(table: ReplayTable) -> None:
    for capture in range(4):
        table.admit(make_job(capture), 56, 0.0)
    old, new = make_job(0), make_job(0, attempt=1)
    put_chunk(table, old, 0, bytes(48))
    assert table.admit(new, 56, 0.0) is Admission.ADMITTED
    assert (get_chunk(table, old, 0), get_chunk(table, new, 0)) == (None, None)
    assert (table.info().resident_bytes, table.info().num_inserting) == (4 * 56, 4)
    with pytest.raises(UnknownSampleError, match=r"attempt 0 of capture 0 .* inserting with attempt 1"):
        put_chunk(table, old, 0, bytes(48))
    with pytest.raises(UnknownSampleError, match="attempt 0"):
        table.commit(make_sample(old), 0.0)
    assert table.abandon(old, failed(old)) is False
    assert table.admit(old, 56, 0.0) is Admission.KNOWN
    table.commit(store(table, new), 0.0)
    assert lease(table)[0].sample.job.attempt == 1
    assert [outcome.attempt for outcome in table.drain_outcomes()] == [1]


def test_takeover_of_another_size_is_counted_anew(table: ReplayTable) -> None:
    table.admit(make_job(0), 56, 0.0)
    assert table.admit(make_job(0, attempt=1, tokens=12), 200, 0.0) is Admission.ADMITTED
    assert table.info().resident_bytes == 200
    table.admit(make_job(1, tokens=1), 24, 0.0)
    assert table.admit(make_job(1, attempt=1, tokens=2), 40, 0.0) is Admission.FULL
    assert (table.info().resident_bytes, table.info().num_inserting) == (200, 1)


# Chunks and commit.


def test_more_bytes_than_reserved_are_refused(table: ReplayTable) -> None:
    job = make_job(0)
    table.admit(job, 56, 0.0)
    put_chunk(table, job, 0, bytes(48))
    with pytest.raises(WireError, match="chunk 1 brings it to 57 bytes, 56 are reserved"):
        put_chunk(table, job, 1, bytes(9))
    assert (get_chunk(table, job, 0), get_chunk(table, job, 1)) == (bytes(48), None)


def test_same_chunk_again_replaces_the_first(table: ReplayTable) -> None:
    job = make_job(0)
    table.admit(job, 56, 0.0)
    put_chunk(table, job, 0, b"a" * 48)
    put_chunk(table, job, 0, memoryview(b"b" * 48))
    put_chunk(table, job, 1, bytearray(8))
    table.commit(make_sample(job), 0.0)
    assert get_chunk(table, job, 0) == b"b" * 48


def test_chunk_out_of_order_is_refused(table: ReplayTable) -> None:
    job = make_job(0)
    table.admit(job, 56, 0.0)
    with pytest.raises(WireError, match="chunk 1 came where chunk 0 was due"):
        put_chunk(table, job, 1, bytes(8))


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ([], "0 chunks are stored, 2 were to be committed"),
        ([48], "1 chunks are stored, 2 were to be committed"),
        ([48, 7], "chunk 1 has 7 bytes in the table, 8 were sent"),
        ([40, 8], "chunk 0 has 40 bytes in the table, 48 were sent"),
    ],
)
def test_incomplete_sample_is_not_committed(table: ReplayTable, stored: list[int], message: str) -> None:
    job = make_job(0)
    table.admit(job, 56, 0.0)
    for index, num_bytes in enumerate(stored):
        put_chunk(table, job, index, bytes(num_bytes))
    with pytest.raises(WireError, match=message):
        table.commit(make_sample(job), 0.0)
    assert lease(table) == []
    assert table.drain_outcomes() == []
    assert table.info().num_inserting == 1


def test_commit_of_more_bytes_than_arrived_is_refused(table: ReplayTable) -> None:
    job = make_job(0, tokens=4)
    table.admit(job, 80, 0.0)
    store(table, job)
    with pytest.raises(WireError, match="72 bytes are stored, 80 were to be committed"):
        table.commit(make_sample(job).model_copy(update={"num_bytes": 80}), 0.0)


def test_commit_gives_back_what_was_reserved_for_a_longer_answer(table: ReplayTable) -> None:
    job = make_job(0, tokens=4)
    table.admit(job, 80, 0.0)
    store(table, job)
    assert table.info().resident_bytes == 80
    table.commit(make_sample(job), 0.0)
    assert (table.info().resident_bytes, table.info().peak_bytes) == (72, 80)
    (leased,) = lease(table)
    table.ack([leased], 0, 1.0)
    assert table.info().resident_bytes == 0


def test_commit_again_changes_nothing(table: ReplayTable) -> None:
    sample = insert(table, make_job(0))
    table.commit(sample, 5.0)
    assert len(table.drain_outcomes()) == 1
    assert (table.info().inserts, table.info().num_ready) == (1, 1)


def test_commit_without_admission_is_refused(table: ReplayTable) -> None:
    with pytest.raises(UnknownSampleError, match="abandoned or never admitted"):
        table.commit(make_sample(make_job(0)), 0.0)


def test_commit_writes_the_outcome_and_ends_the_job(table: ReplayTable, work: CaptureQueue) -> None:
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


def test_many_outcomes_are_drained_in_order(table: ReplayTable) -> None:
    for capture in range(1203):
        job = make_job(capture)
        table.admit(job, 56, 0.0)
        assert table.abandon(job, failed(job))
    assert [outcome.capture for outcome in table.drain_outcomes()] == list(range(1203))


def test_abandoned_capture_frees_its_bytes_once(table: ReplayTable) -> None:
    job = make_job(0)
    table.admit(job, 56, 0.0)
    put_chunk(table, job, 0, bytes(48))
    assert table.abandon(job, failed(job, retry=True)) is True
    assert table.abandon(job, failed(job, retry=True)) is False
    assert table.drain_outcomes() == [failed(job, retry=True)]
    assert (table.info().resident_bytes, table.info().num_inserting) == (0, 0)
    assert get_chunk(table, job, 0) is None
    assert table.admit(job, 56, 0.0) is Admission.ADMITTED


def test_committed_sample_cannot_be_abandoned(table: ReplayTable) -> None:
    job = make_job(0)
    insert(table, job)
    table.drain_outcomes()
    assert table.abandon(job, failed(job)) is False
    assert table.drain_outcomes() == []
    assert table.info().num_ready == 1


def test_job_that_was_never_admitted_can_be_abandoned(table: ReplayTable, work: CaptureQueue) -> None:
    work.push(make_job(0))
    job = work.take(0.0, 10.0)
    assert job is not None
    assert table.abandon(job, failed(job)) is True
    assert table.drain_outcomes() == [failed(job)]
    assert work.done(job) is False


# Leases.


def test_leases_are_in_order_of_commit(table: ReplayTable) -> None:
    jobs = [make_job(capture) for capture in (5, 3, 4)]
    for job in jobs:
        table.admit(job, 56, 0.0)
    for job in (jobs[1], jobs[0], jobs[2]):
        table.commit(store(table, job), 0.0)
    assert captures_of(lease(table, 3)) == [3, 5, 4]


def test_lease_is_empty_until_so_many_are_ready(table: ReplayTable) -> None:
    insert(table, make_job(0))
    assert lease(table, 2) == []
    assert (table.info().samples, table.info().num_leased) == (0, 0)
    insert(table, make_job(1))
    assert captures_of(lease(table, 2)) == [0, 1]


def test_sealed_table_gives_the_rest(table: ReplayTable) -> None:
    insert(table, make_job(0))
    table.seal()
    assert table.info().sealed
    assert captures_of(lease(table, 2)) == [0]
    assert lease(table, 2) == []


def test_lease_carries_the_sample_and_its_use(roomy: ReplayTable) -> None:
    table = roomy
    sample = insert(table, make_job(4, reuse=3))
    leases = [lease(table)[0] for _ in range(3)]
    assert [(item.use, item.k) for item in leases] == [(12, 0), (13, 1), (14, 2)]
    assert all(item.sample == sample for item in leases)
    assert len({item.lease_id for item in leases}) == 3
    assert lease(table) == []
    for item, left in zip(leases, (56, 56, 0), strict=True):
        table.ack([item], 0, 0.0)
        assert table.info().resident_bytes == left


def test_reused_sample_goes_to_the_end_of_the_line(roomy: ReplayTable) -> None:
    table = roomy
    for capture in range(3):
        insert(table, make_job(capture, reuse=2))
    assert [(item.sample.job.capture, item.k) for item in lease(table, 6)] == [
        *((0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1)),
    ]


def test_job_feeds_only_the_uses_it_names(roomy: ReplayTable) -> None:
    table = roomy
    insert(table, make_job(2, reuse=3, ks=(2, 1)))
    leases = lease(table, 2)
    assert [(item.use, item.k) for item in leases] == [(7, 1), (8, 2)]
    table.ack(leases, 0, 0.0)
    assert table.info().resident_bytes == 0


def test_named_captures_are_leased_together_in_their_order(table: ReplayTable) -> None:
    for capture in (0, 1, 2):
        insert(table, make_job(capture))
    assert lease(table, captures=[2, 3]) == []
    assert table.info().num_leased == 0
    insert(table, make_job(3))
    assert captures_of(lease(table, captures=[3, 0])) == [3, 0]
    assert lease(table, captures=[0, 1]) == []
    assert lease(table, captures=[]) == []
    assert captures_of(lease(table, 2)) == [1, 2]


def test_capture_named_twice_needs_two_uses(roomy: ReplayTable) -> None:
    table = roomy
    insert(table, make_job(0, reuse=2))
    assert lease(table, captures=[0, 0, 0]) == []
    assert [item.k for item in lease(table, captures=[0, 0])] == [0, 1]


def test_replayed_ack_changes_nothing(table: ReplayTable) -> None:
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


def test_released_use_is_ready_again_in_its_old_place(table: ReplayTable) -> None:
    for capture in range(3):
        insert(table, make_job(capture))
    leases = lease(table, 2)
    table.release(leases, 0)
    assert captures_of(lease(table, 3)) == [0, 1, 2]
    with pytest.raises(UnknownSampleError, match="not held"):
        table.release(leases, 0)


def test_overdue_lease_is_refused_and_its_use_ready_again(table: ReplayTable) -> None:
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


def test_older_generation_is_refused_everywhere(table: ReplayTable) -> None:
    insert(table, make_job(0))
    (leased,) = lease(table)
    table.set_generation(2)
    table.set_generation(2)
    assert table.generation() == 2
    for call in (
        lambda: lease(table, generation=1),
        lambda: table.ack([leased], 0, 0.0),
        lambda: table.release([leased], 0),
        lambda: table.set_generation(1),
    ):
        with pytest.raises(StaleGenerationError, match="not the current one of the replay table 'run', 2"):
            call()
    with pytest.raises(TableLostError, match="being made anew: it has generation 2, not yet 3"):
        lease(table, generation=3)
    with pytest.raises(UnknownSampleError):
        table.ack([leased], 2, 0.0)
    assert captures_of(lease(table, generation=2)) == [0]


def test_new_generation_gets_whole_samples_and_recaptures_the_others(roomy: ReplayTable) -> None:
    table = roomy
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


def test_lease_of_a_lost_table_is_unknown_to_the_new_one(table: ReplayTable) -> None:
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


def test_new_generation_finds_samples_in_order_of_commit(roomy: ReplayTable) -> None:
    for capture in range(3):
        insert(roomy, make_job(capture, reuse=2))
    assert captures_of(lease(roomy)) == [0]  # it stands behind 1 and 2 now
    roomy.set_generation(1)
    assert captures_of(lease(roomy, 3, generation=1)) == [0, 1, 2]


# Clearing.


def test_clear_drops_samples_leases_and_jobs_and_keeps_what_was_not_drained(
    table: ReplayTable, work: CaptureQueue
) -> None:
    for capture in (0, 1):
        insert(table, make_job(capture))
    (held,) = lease(table)
    in_flight = make_job(2)
    work.push(in_flight)
    work.push(make_job(3))
    assert work.take(0.0, 10.0) == in_flight
    table.admit(in_flight, JOB_BYTES, 0.0, queued=True)
    put_chunk(table, in_flight, 0, bytes(48))
    table.admit(make_job(4), JOB_BYTES, 0.0)
    assert table.admit(make_job(5), JOB_BYTES, 0.0) is Admission.FULL
    table.seal()
    before = table.incarnation()
    cleared = table.clear(3)
    assert cleared.incarnation == table.incarnation() != before
    assert [(outcome.capture, outcome.kind) for outcome in cleared.outcomes] == [(0, "committed"), (1, "committed")]
    assert (table.drain_outcomes(), work.size(), work.expire(1e9)) == ([], 0, [])
    info = table.info()
    assert (info.resident_bytes, info.num_ready, info.num_ready_uses, info.num_leased, info.num_inserting) == (0,) * 5
    assert (info.inserts, info.samples, info.deletes, info.difference, info.wanted_bytes) == (0,) * 5
    assert (info.generation, info.sealed, info.peak_bytes) == (3, False, 4 * JOB_BYTES)
    assert get_chunk(table, in_flight, 0) is None
    with pytest.raises(UnknownSampleError, match="abandoned or never admitted"):
        put_chunk(table, in_flight, 1, bytes(8))
    with pytest.raises(StaleGenerationError):
        table.ack([held], 0, 0.0)
    with pytest.raises(UnknownSampleError, match="not held"):
        table.ack([held], 3, 0.0)
    insert(table, make_job(1))
    assert captures_of(lease(table, generation=3)) == [1]


def test_clear_for_an_older_generation_changes_nothing(table: ReplayTable) -> None:
    table.set_generation(2)
    insert(table, make_job(0))
    with pytest.raises(StaleGenerationError, match=r"generation 1 .* 2: this trainer group"):
        table.clear(1)
    assert table.info().num_ready == 1
    table.clear(2)
    assert table.info().num_ready == 0


def test_job_that_left_the_queue_is_not_admitted(table: ReplayTable, work: CaptureQueue) -> None:
    work.push(make_job(0))
    work.take(0.0, 10.0)
    assert table.admit(make_job(1), JOB_BYTES, 0.0, queued=True) is Admission.GONE
    assert table.admit(make_job(0, attempt=1), JOB_BYTES, 0.0, queued=True) is Admission.GONE
    assert table.info().resident_bytes == 0
    assert table.admit(make_job(0), JOB_BYTES, 0.0, queued=True) is Admission.ADMITTED
    assert table.admit(make_job(0), JOB_BYTES, 0.0, queued=True) is Admission.KNOWN
