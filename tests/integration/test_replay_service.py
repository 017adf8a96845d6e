"""The replay service over real gRPC and real Redis: what producers and consumers can rely on."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from replay_serving import (
    PATIENT,
    SAMPLE_BYTES,
    SIGNATURE,
    TOKENS,
    WAIT_S,
    Serving,
    assert_equal,
    features,
    ids,
    insert,
    serving,
    take,
)
from waiting import wait_until

from services.checksum import crc32c
from services.codec import byte_view
from services.contracts import CaptureJob, Chunk, LeaseName, Outcome, TensorName
from services.errors import (
    DeadlineError,
    FeatureError,
    ReplayBusyError,
    ReplayError,
    ReplayRequestError,
    ReplayUnavailableError,
    SampleTooLargeError,
    SignatureError,
    StaleGenerationError,
    TableLostError,
    UnknownSampleError,
    WireError,
)
from services.replay.connect import connect
from services.replay.embedded import EmbeddedRedis
from services.replay.insert_stream import InsertStream
from services.replay.reader import ReplayReader
from services.replay.service_client import Producer, ReplayClient
from services.replay.table import RedisTable
from services.replay.wire import MAX_TOKENS, pack_chunk, write_chunk
from services.replay.work import WorkQueue
from services.target.framing import FramedChunk
from services.wire import replay_pb2 as wire


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedRedis]:
    with EmbeddedRedis.start(tmp_path_factory.mktemp("redis"), 64 * 1024**2) as running:
        yield running


@pytest.fixture
def served(embedded: EmbeddedRedis) -> Iterator[Serving]:
    with serving(embedded, reuse=2) as running:
        yield running


@pytest.fixture
def client(served: Serving) -> Iterator[ReplayClient]:
    with ReplayClient(served.address) as connected:
        yield connected


@pytest.fixture
def producer(client: ReplayClient) -> Iterator[Producer]:
    with client.producer(SIGNATURE, "tests") as opened:
        yield opened


def test_samples_come_out_as_they_went_in(served: Serving, client: ReplayClient, producer: Producer) -> None:
    assert [insert(producer, number, prompt=7, epoch=2) for number in (1, 2)] == [True, True]
    first = take(client, 2)
    second = take(client, 2)
    for sample in (*first, *second):
        assert_equal(sample)
    assert ids(first) == [1, 2]
    assert {(item.lease.sample.job.capture, item.lease.k) for item in (*first, *second)} == {
        (capture, k) for capture in (1, 2) for k in (0, 1)
    }
    job = first[0].lease.sample.job
    assert (job.prompt, job.epoch, job.loss_mask) == (7, 2, (0, 0, 0, 1, 1, 1))
    assert first[0].lease.sample.target == "tests"
    client.ack([item.lease for item in (*first, *second)])
    producer.close()
    served.assert_at_rest()


def test_leases_are_those_of_the_table(served: Serving, client: ReplayClient, producer: Producer) -> None:
    insert(producer, 1, num_uses=1)
    (lease,) = client.lease(count=1, lease_s=600, wait_s=WAIT_S)
    record = served.redis.hget(f"{served.prefix}:sample:1", "record")
    assert record is not None
    assert lease.sample.model_dump_json() == record.decode()
    assert lease.use == 2
    client.release([lease])
    (again,) = served.table.lease(rank=0, generation=0, count=1, now_s=0.0, lease_s=60)
    assert again.model_copy(update={"lease_id": lease.lease_id}) == lease


def test_chunks_are_read_from_redis_where_the_service_says(embedded: EmbeddedRedis) -> None:
    config = PATIENT.model_copy(update={"chunks_url": embedded.url})
    with serving(embedded, config=config) as served, ReplayClient(served.address) as client:
        with client.producer(SIGNATURE) as producer:
            insert(producer, 3)
        info = client.info()
        assert info.redis_url == embedded.url
        (lease,) = client.lease(count=1, lease_s=600, wait_s=WAIT_S)
        reader = ReplayReader(info.redis_url, info.prefix, info.signature)
        sample = reader.fetch(lease)
        context, last = features(3)
        assert (sample.context.equal(context), sample.last.equal(last)) == (True, True)
        client.ack([lease])
        reader.close()
        served.assert_at_rest()


def test_info_says_what_the_table_says(served: Serving, client: ReplayClient, producer: Producer) -> None:
    insert(producer, 1)
    info = client.info()
    assert info.table == served.table.info()
    assert (info.signature, info.prefix, info.redis_url) == (SIGNATURE, served.prefix, None)


def test_password_of_redis_is_told_nobody(embedded: EmbeddedRedis) -> None:
    config = PATIENT.model_copy(update={"chunks_url": "redis://user:secret@elsewhere:6379/0"})
    with serving(embedded, config=config) as served, ReplayClient(served.address) as client:
        assert client.info().redis_url == "redis://user@elsewhere:6379/0"


def test_sample_larger_than_the_window_comes_on_credit(embedded: EmbeddedRedis) -> None:
    tokens = MAX_TOKENS
    with serving(embedded, samples=tokens * 32 / SAMPLE_BYTES + 2) as served, ReplayClient(served.address) as client:
        with client.producer(SIGNATURE) as producer:
            insert(producer, 1, tokens)
        (sample,) = take(client)
        assert len(sample.lease.sample.chunks) > 8
        assert_equal(sample)
        client.ack([sample.lease])
        served.assert_at_rest()


def test_repeat_of_a_sample_is_not_inserted_again(served: Serving, client: ReplayClient, producer: Producer) -> None:
    assert insert(producer, 1)
    assert not insert(producer, 1)
    samples = [*take(client), *take(client)]
    client.ack([sample.lease for sample in samples])
    assert not insert(producer, 1), "it was used up, and is still remembered"
    assert insert(producer, 2), "the stream goes on"
    assert served.table.info().inserts == 2
    assert served.problems() == []


def test_repeat_is_known_to_a_service_that_began_anew(embedded: EmbeddedRedis) -> None:
    with serving(embedded) as served, ReplayClient(served.address) as client, client.producer(SIGNATURE) as producer:
        insert(producer, 1)
        client.ack([sample.lease for sample in take(client)])
        insert(producer, 2)
    with serving(embedded, prefix=served.prefix) as again, ReplayClient(again.address) as client:
        with client.producer(SIGNATURE) as producer:
            assert [insert(producer, number) for number in (1, 2, 3)] == [False, False, True]
        assert ids(take(client, 2)) == [2, 3]


def test_other_sample_under_a_known_id_is_refused(served: Serving, client: ReplayClient, producer: Producer) -> None:
    insert(producer, 1)
    with pytest.raises(ReplayError, match="sample id 1 was taken by another sample, with 6 tokens"):
        insert(producer, 1, TOKENS + 1)
    client.ack([sample.lease for sample in (*take(client), *take(client))])
    with pytest.raises(ReplayError, match="sample id 1 was taken by another sample, with 6 tokens"):
        insert(producer, 1, TOKENS + 1)
    assert insert(producer, 2)
    served.assert_at_rest(SAMPLE_BYTES)


def test_full_buffer_makes_producers_wait_in_their_order(embedded: EmbeddedRedis) -> None:
    with serving(embedded, samples=2) as served, ReplayClient(served.address) as client:
        with client.producer(SIGNATURE) as producer:
            for number in (0, 1):
                insert(producer, number)

        def bring(number: int) -> bool:
            with client.producer(SIGNATURE) as producer:
                return insert(producer, number)

        with ThreadPoolExecutor(3) as pool:
            brought = []
            for waiting, number in enumerate((2, 3, 4), start=1):
                brought.append(pool.submit(bring, number))
                wait_until(lambda n=waiting: served.redis.hlen(f"{served.prefix}:work:jobs") == n, "a waiting producer")
            assert not any(future.done() for future in brought)
            order = []
            for num_used in range(1, 6):
                (sample,) = take(client)
                assert_equal(sample)
                order += ids([sample])
                assert served.table.info().resident_bytes <= 2 * SAMPLE_BYTES
                assert served.problems() == []
                client.ack([sample.lease])
                # Who is let in goes on at a pace of its own: let it arrive before the next one is.
                num_in = min(2 + num_used, 5)
                wait_until(lambda n=num_in: served.table.info().inserts == n, "the producer that has room now")
            assert order == [0, 1, 2, 3, 4]
            assert all(future.result() for future in brought)
        served.assert_at_rest()
        assert served.table.info().peak_bytes == 2 * SAMPLE_BYTES


def test_rate_limiter_makes_producers_wait(embedded: EmbeddedRedis) -> None:
    with serving(embedded, samples=100, error_buffer=1) as served, ReplayClient(served.address) as client:
        with client.producer(SIGNATURE) as producer:
            insert(producer, 0)
            insert(producer, 1)
            with pytest.raises(DeadlineError, match="the rate limiter lets no sample in before more uses are leased"):
                insert(producer, 2, wait_s=0.1)
            client.ack([sample.lease for sample in take(client)])
            assert insert(producer, 2)
        served.assert_at_rest(2 * SAMPLE_BYTES)


def test_wait_for_room_ends_at_its_deadline(embedded: EmbeddedRedis) -> None:
    with serving(embedded, samples=1) as served, ReplayClient(served.address) as client:
        with client.producer(SIGNATURE) as producer:
            insert(producer, 0)
            with pytest.raises(
                DeadlineError, match=r"sample 1 waited \d+ s: the replay buffer has no room: 224 of 224"
            ):
                insert(producer, 1, wait_s=0.1)
        served.assert_at_rest(SAMPLE_BYTES)


def test_sample_that_fits_no_empty_buffer_is_refused_at_once(client: ReplayClient, producer: Producer) -> None:
    with pytest.raises(SampleTooLargeError, match="the whole replay buffer holds 896"):
        insert(producer, 1, 100)
    assert insert(producer, 1)


def test_wrong_signature_is_refused_before_anything_is_sent(served: Serving, client: ReplayClient) -> None:
    other = SIGNATURE.model_copy(update={"fingerprint": "beef"})
    with client.producer(other) as producer, pytest.raises(SignatureError, match=r"f00d.*not of.*beef"):
        insert(producer, 1)
    served.assert_at_rest()


def test_wire_dtype_that_the_table_forbids_is_refused_at_the_first_insert(
    served: Serving, client: ReplayClient
) -> None:
    other = SIGNATURE.model_copy(update={"dtype": "fp8_e4m3"})
    with (
        client.producer(other) as producer,
        pytest.raises(SignatureError, match=r"\(dtype fp8_e4m3, not bf16\): capture with the same .* dtype, or give"),
    ):
        producer.insert(1, token_ids=[1], loss_mask=[1], last_rows=[], context=bytes(other.context_row_bytes), last=b"")
    served.assert_at_rest()


def test_buffers_that_do_not_fit_are_refused_by_the_client(producer: Producer) -> None:
    with pytest.raises(WireError, match="context has 8 bytes, 1 rows of 32 are needed"):
        producer.insert(1, token_ids=[1], loss_mask=[1], last_rows=[], context=bytes(8), last=b"")


def test_features_that_are_not_finite_are_refused(served: Serving, producer: Producer) -> None:
    context, _ = features(1)
    context[3, 3] = float("nan")
    with pytest.raises(FeatureError, match="hold NaN or infinity as bf16, first row 3"):
        producer.insert(1, token_ids=range(6), loss_mask=[1] * 6, last_rows=[], context=byte_view(context), last=b"")
    wait_until(lambda: served.table.info().num_inserting == 0, "the end of the refused sample")
    served.assert_at_rest()


def test_stream_ends_where_the_producer_falls_silent(embedded: EmbeddedRedis, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = threading.Event()
    store = InsertStream._store

    def store_and_be_impatient(stream: InsertStream, *arguments: Any) -> None:
        store(stream, *arguments)
        assert seen.wait(WAIT_S)
        stream._config = stream._config.model_copy(update={"progress_s": 0.3})

    monkeypatch.setattr(InsertStream, "_store", store_and_be_impatient)
    with serving(embedded) as served, ReplayClient(served.address) as client:
        half = HalfSent(client, 1)
        wait_until(lambda: served.table.info().num_inserting == 1, "a sample on its way")
        assert served.problems() == []
        seen.set()
        with pytest.raises(DeadlineError, match=r"nothing came from the producer for 0\.3 s, sample 1 was due"):
            half.answers_until_the_end()
        served.assert_at_rest()


def test_connection_that_drops_gives_the_bytes_back(served: Serving) -> None:
    with ReplayClient(served.address) as client:
        half = HalfSent(client, 1)
        wait_until(lambda: served.table.info().num_inserting == 1, "a sample on its way")
        assert served.table.info().resident_bytes == SAMPLE_BYTES
    with pytest.raises(ReplayUnavailableError):
        half.answers_until_the_end()
    wait_until(lambda: served.table.info().num_inserting == 0, "the end of the dropped sample")
    served.assert_at_rest()


def test_producer_that_comes_back_takes_its_own_room_over(embedded: EmbeddedRedis) -> None:
    """The buffer is full with its first try, which the service does not know to be dead."""
    with serving(embedded, samples=1) as served, ReplayClient(served.address) as client:
        half = HalfSent(client, 1)
        wait_until(lambda: served.table.info().num_inserting == 1, "a sample on its way")
        with (
            ThreadPoolExecutor(1) as pool,
            client.producer(SIGNATURE) as other,
            client.producer(SIGNATURE) as producer,
        ):
            first_in_line = pool.submit(insert, other, 2)
            wait_until(lambda: served.redis.hlen(f"{served.prefix}:work:jobs") == 2, "another one that waits for room")
            assert insert(producer, 1, wait_s=WAIT_S)
            assert served.problems() == []
            client.ack([sample.lease for sample in take(client, 0, captures=[1])])
            assert first_in_line.result()
        assert served.problems() == []
        half.send_rest()
        with pytest.raises(UnknownSampleError, match="of capture 1 is not being inserted"):
            half.answers_until_the_end()
        (sample,) = take(client)
        assert_equal(sample)
        client.ack([sample.lease])
        served.assert_at_rest()


def test_service_that_begins_anew_frees_what_was_on_its_way(embedded: EmbeddedRedis) -> None:
    """What a killed service leaves: reservations and jobs of nobody."""
    with serving(embedded) as served:
        pass
    for number, attempt in ((1, 4), (2, 0)):
        job = CaptureJob(
            capture=number, attempt=attempt, prompt=0, epoch=0, input_ids=(1,), loss_mask=(1,), last_rows=()
        )
        with contextlib.closing(connect(embedded.url)) as redis:
            WorkQueue(redis, served.prefix).push(job)
            if number == 1:
                RedisTable(redis, served.prefix).admit(job, SAMPLE_BYTES, 0.0)
    with serving(embedded, prefix=served.prefix) as again:
        again.assert_at_rest()


def test_sample_that_could_not_be_freed_is_freed_later(
    served: Serving, client: ReplayClient, producer: Producer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Redis does not answer when its producer is gone."""
    freed, refused = RedisTable.abandon, 0

    def away_at_first(table: RedisTable, job: CaptureJob, outcome: Outcome) -> bool:
        nonlocal refused
        refused += 1
        if refused <= 2:
            raise ReplayUnavailableError("Redis does not answer")
        return freed(table, job, outcome)

    monkeypatch.setattr(RedisTable, "abandon", away_at_first)
    context, _ = features(1)
    context[0, 0] = float("inf")
    with pytest.raises(FeatureError):
        producer.insert(1, token_ids=range(6), loss_mask=[1] * 6, last_rows=[], context=byte_view(context), last=b"")
    wait_until(lambda: served.table.info().num_inserting == 0, "the freed sample")
    assert refused == 3
    served.assert_at_rest()


def test_second_service_under_a_prefix_is_refused(embedded: EmbeddedRedis, served: Serving) -> None:
    with pytest.raises(ReplayError, match="belongs to here"), serving(embedded, prefix=served.prefix, owner="there"):
        pass
    with pytest.raises(ReplayError, match="cannot listen on"), serving(embedded, address=served.address):
        pass
    assert served.problems() == []


def test_acks_are_taken_once_and_from_the_current_group(
    served: Serving, client: ReplayClient, producer: Producer
) -> None:
    insert(producer, 1)
    (sample,) = take(client)
    client.ack([sample.lease])
    with pytest.raises(UnknownSampleError, match="is not held: acked or released before"):
        client.ack([sample.lease])
    (sample,) = take(client)
    with pytest.raises(UnknownSampleError, match="is not held"):
        client.ack([sample.lease, LeaseName(lease_id="no.1")])
    with pytest.raises(UnknownSampleError, match="named twice"):
        client.release([sample.lease, sample.lease])
    with pytest.raises(TableLostError, match="generation 0, not yet 3"):
        client.ack([sample.lease], generation=3)
    served.table.set_generation(1)
    for call in (client.ack, client.release):
        with pytest.raises(StaleGenerationError, match="this trainer group has been replaced"):
            call([sample.lease])
    with pytest.raises(StaleGenerationError):
        take(client)
    served.assert_at_rest()
    assert insert(producer, 1), "its first use was acked, so a new group needs it anew"
    (fresh,) = take(client, generation=1)
    assert_equal(fresh)


def test_samples_nobody_knows_are_waited_for_and_passed_over(client: ReplayClient, producer: Producer) -> None:
    assert take(client, 0, wait_s=0.1, captures=[99]) == []
    assert client.update_priorities({99: 0.5}) == 0
    insert(producer, 99)
    assert client.update_priorities({99: 0.5}) == 1
    assert ids(take(client, 0, captures=[99])) == [99]


def test_lease_past_its_deadline_is_ready_again(served: Serving, client: ReplayClient, producer: Producer) -> None:
    insert(producer, 1, num_uses=1)
    (late,) = client.lease(count=1, lease_s=0.05, wait_s=WAIT_S)
    (sample,) = take(client)
    with pytest.raises(UnknownSampleError):
        client.ack([late])
    client.ack([sample.lease])
    served.assert_at_rest()


def test_caller_who_stops_waiting_leaves_no_lease(served: Serving, client: ReplayClient, producer: Producer) -> None:
    def wait_in_vain(impatient: ReplayClient) -> None:
        with pytest.raises(ReplayUnavailableError):
            take(impatient)

    with ReplayClient(served.address) as impatient:
        waiting = threading.Thread(target=wait_in_vain, args=(impatient,))
        waiting.start()
        wait_until(lambda: served.service._service._leases._free._value < 32, "a call that waits")
    waiting.join()
    insert(producer, 1)
    samples = [*take(client), *take(client)]
    assert ids(samples) == [1, 1]
    client.ack([sample.lease for sample in samples])
    served.assert_at_rest()


def test_lease_that_cannot_be_delivered_goes_back(served: Serving, client: ReplayClient, producer: Producer) -> None:
    insert(producer, 1)
    key = f"{served.prefix}:chunk:1:0:0"
    chunk = served.redis.get(key)
    assert chunk is not None
    served.redis.delete(key)
    with pytest.raises(UnknownSampleError, match="chunk 0 of capture 1 is not in the replay buffer"):
        take(client)
    wait_until(lambda: served.table.info().num_leased == 0, "the lease to go back")
    served.redis.set(key, chunk[:-1])
    with pytest.raises(WireError, match="has 191 bytes in the replay buffer, its rows need 192"):
        take(client)
    served.redis.set(key, b"\x01" + chunk[1:])
    with pytest.raises(WireError, match="checksum of 192 bytes"):
        take(client)


def test_more_streams_than_the_service_takes_are_told_so(embedded: EmbeddedRedis) -> None:
    config = PATIENT.model_copy(update={"max_inserts": 1, "max_leases": 1})
    with serving(embedded, config=config) as served, ReplayClient(served.address) as client:
        with client.producer(SIGNATURE) as first, client.producer(SIGNATURE) as second:
            insert(first, 1)
            with pytest.raises(ReplayBusyError, match="1 inserts at once already"):
                insert(second, 2)
            first.close()
            wait_until(lambda: inserted(second, 2), "the place of the first stream")
        assert ids(take(client, 2)) == [1, 2]


def test_stopping_service_lets_a_sample_arrive(embedded: EmbeddedRedis) -> None:
    with serving(embedded) as served, ReplayClient(served.address) as client:
        half = HalfSent(client, 1)
        wait_until(lambda: served.table.info().num_inserting == 1, "a sample on its way")
        stopping = threading.Thread(target=served.service.stop, args=(WAIT_S,))
        stopping.start()
        with pytest.raises(ReplayUnavailableError):
            wait_until(lambda: not client.info(), "the end of new calls")
        half.send_rest()
        with pytest.raises(ReplayUnavailableError, match="the replay service is stopping"):
            half.answers_until_the_end()
        stopping.join()
        assert served.table.info().inserts == 1
        served.assert_at_rest(SAMPLE_BYTES)


def test_service_makes_its_table_anew_when_redis_lost_it(served: Serving, client: ReplayClient) -> None:
    with client.producer(SIGNATURE) as producer:
        assert [insert(producer, 1), insert(producer, 1)] == [True, False]
        served.redis.flushall()

        def is_there() -> bool:
            return served.table.incarnation() is not None

        wait_until(is_there, "a new table")
        assert insert(producer, 1), "what was lost with Redis is wanted again"
    assert ids(take(client)) == [1]


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        (wire.LeaseRequest(lease_s=1), "a lease of 0 uses"),
        (wire.LeaseRequest(count=2, lease_s=1, sample_ids=[1]), "give one of the two"),
        (wire.LeaseRequest(count=1), "lease_s 0.0 must lie above 0"),
        (wire.LeaseRequest(count=1, lease_s=float("nan")), "lease_s nan must lie above 0"),
        (wire.LeaseRequest(count=1, lease_s=1, max_wait_s=-1.0), "max_wait_s -1.0"),
        (wire.LeaseRequest(lease_s=1, sample_ids=[2**60]), r"is not below 2\^53"),
        (wire.LeaseRequest(count=1, lease_s=1, generation=2**60), r"generation .* is not below 2\^53"),
        (wire.LeaseRequest(count=10**6, lease_s=1), "ask for 1 to 4096"),
    ],
)
def test_wrong_lease_request_is_told_why(client: ReplayClient, request_: wire.LeaseRequest, says: str) -> None:
    with pytest.raises(ReplayRequestError, match=says):
        list(client._leases(request_, 1.0))


def test_wrong_acks_and_priorities_are_told_why(client: ReplayClient) -> None:
    with pytest.raises(ReplayRequestError, match="0 lease ids"):
        client.ack([])
    with pytest.raises(ReplayRequestError, match="none of ours"):
        client.ack([LeaseName(lease_id="x" * 1000)])
    with pytest.raises(ReplayRequestError, match=r"rejection 1\.5 of sample 3"):
        client.update_priorities({3: 1.5})
    with pytest.raises(ReplayRequestError, match="rejection nan"):
        client.update_priorities({3: float("nan")})


def inserted(producer: Producer, sample_id: int) -> bool:
    try:
        return insert(producer, sample_id)
    except ReplayBusyError:
        return False


class HalfSent:
    """An Insert stream that has sent the context of a sample, and not yet the rest."""

    def __init__(self, client: ReplayClient, sample_id: int) -> None:
        self._producer = client.producer(SIGNATURE)
        self._stream = self._producer._open()
        self._sample_id = sample_id
        context, self._last = features(sample_id)
        begin = wire.Begin(
            sample_id=sample_id,
            token_ids=range(100, 100 + TOKENS),
            loss_mask=[0, 0, 0, 1, 1, 1],
            last_rows=[TOKENS - 3, TOKENS - 2],
        )
        self._stream.send(wire.InsertRequest(begin=begin).SerializeToString())
        assert self._stream.answer().credit.num_bytes == SAMPLE_BYTES
        self._send("context", byte_view(context), TOKENS)

    def send_rest(self) -> None:
        self._send("last", byte_view(self._last), 2)
        commit = wire.InsertRequest(commit=wire.Commit(sample_id=self._sample_id))
        self._stream.send(commit.SerializeToString())

    def answers_until_the_end(self) -> None:
        while True:
            self._stream.answer()

    def _send(self, tensor: TensorName, payload: memoryview, rows: int) -> None:
        job = CaptureJob(capture=self._sample_id, prompt=0, epoch=0, input_ids=(), loss_mask=(), last_rows=())
        chunk = Chunk(tensor=tensor, row_start=0, row_end=rows, num_bytes=payload.nbytes, crc32c=crc32c(payload))
        self._stream.send(pack_chunk(wire.InsertRequest, FramedChunk(write_chunk(job, chunk, SIGNATURE), payload)))
