from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from waiting import wait_until

from services.contracts import CaptureJob, Chunk, Sample, SampleLease, TableSignature
from services.errors import DeadlineError, ReplayUnavailableError, SignatureError, UnknownSampleError
from services.replay.leasing import Leasing
from services.replay.links import ShardLink, shard_of, sum_infos
from services.replay.memory_table import MemoryStore, MemoryTable, MemoryWorkQueue
from services.replay.rate_limiter import RateLimiter
from services.replay.rules import Admission

SIGNATURE = TableSignature(fingerprint="f", layer_ids=(0,), hidden_size=4, dtype="bf16")
TOKENS = 3
SAMPLE_BYTES = SIGNATURE.sample_bytes(TOKENS, 1)
LEASE_S = 60.0
DEADLINE_S = 120.0


def make_job(capture: int, reuse: int = 1) -> CaptureJob:
    return CaptureJob(
        capture=capture,
        prompt=capture,
        epoch=0,
        reuse=reuse,
        input_ids=(1,) * TOKENS,
        loss_mask=(1,) * TOKENS,
        last_rows=(0,),
    )


class Shard:
    """A table in memory, which can be taken away."""

    def __init__(
        self,
        number: int = 0,
        capacity: int = 100,
        reuse: int = 1,
        limiter: RateLimiter | None = None,
        *,
        is_local: bool = True,
    ) -> None:
        self._make = lambda: self._table.create(capacity * SAMPLE_BYTES, SIGNATURE, reuse, limiter)
        self._table = MemoryTable(MemoryStore())
        self._make()
        self.number, self.reuse = number, reuse
        self.is_away = False
        queue: Any = MemoryWorkQueue(MemoryStore())
        table: Any = self
        client: Any = None
        self.link = ShardLink(number, client, table, queue, client, is_local)

    def __getattr__(self, name: str) -> Any:
        if self.is_away:
            raise ReplayUnavailableError(f"shard {self.number} is away")
        return getattr(self._table, name)

    def put(self, *captures: int) -> None:
        for capture in captures:
            job = make_job(capture, self.reuse)
            assert self.admit(job, SAMPLE_BYTES, 0.0) is Admission.ADMITTED
            self.commit_sample(job)

    def commit_sample(self, job: CaptureJob) -> None:
        sizes = (("context", TOKENS, SIGNATURE.context_row_bytes), ("last", 1, SIGNATURE.last_row_bytes))
        chunks = tuple(
            Chunk(tensor=tensor, row_start=0, row_end=rows, num_bytes=rows * row_bytes, crc32c=0)
            for tensor, rows, row_bytes in sizes
        )
        with self.writing(job) as writer:
            for index, chunk in enumerate(chunks):
                writer.write(index, bytes(chunk.num_bytes))
        self.commit(Sample(job=job, chunks=chunks, num_bytes=SAMPLE_BYTES, target="t"), 0.0)

    def restart_empty(self) -> None:
        self._table = MemoryTable(MemoryStore())
        self._make()


def leasing_from(shards: Iterable[Shard]) -> Leasing:
    return Leasing([shard.link for shard in shards], "p", SIGNATURE, clock=lambda: 0.0)


def lease(leasing: Leasing, count: int, captures: Sequence[int] | None = None, **changes: Any) -> list[SampleLease]:
    how = {"rank": 0, "generation": 0, "lease_s": LEASE_S, "timeout_s": DEADLINE_S} | changes
    return leasing.lease(count=count, captures=captures, **how)


def places(leases: Sequence[SampleLease]) -> list[tuple[int, int]]:
    """(shard, capture) of each."""
    return [(lease.shard, lease.sample.job.capture) for lease in leases]


def test_micro_batch_comes_whole_from_the_fullest_shard_that_has_it():
    shards = [Shard(0), Shard(1), Shard(2)]
    shards[0].put(0, 1)
    shards[1].put(10, 11, 12)
    shards[2].put(20)
    leasing = leasing_from(shards)
    assert places(lease(leasing, 2)) == [(1, 10), (1, 11)]
    assert places(lease(leasing, 2)) == [(0, 0), (0, 1)], "which has them all; shard 1 has as many bytes, one ready"


def test_shards_of_this_machine_are_asked_first():
    shards = [Shard(0, is_local=False), Shard(1)]
    shards[0].put(0, 1, 2)
    shards[1].put(10)
    assert places(lease(leasing_from(shards), 1)) == [(1, 10)]


def test_micro_batch_is_put_together_where_no_shard_has_all_of_it():
    shards = [Shard(0), Shard(1)]
    shards[0].put(0)
    shards[1].put(10, 11)
    leases = lease(leasing_from(shards), 3)
    assert sorted(places(leases)) == [(0, 0), (1, 10), (1, 11)]
    assert [shard.info().num_leased for shard in shards] == [1, 2]


def test_what_was_leased_is_kept_while_the_rest_is_waited_for():
    shards = [Shard(0), Shard(1)]
    shards[0].put(0)
    got: list[SampleLease] = []
    waiting = threading.Thread(target=lambda: got.extend(lease(leasing_from(shards), 2)))
    waiting.start()
    wait_until(lambda: shards[0].info().num_leased == 1, "the first half")
    shards[1].put(10)
    waiting.join(DEADLINE_S)
    assert places(got) == [(0, 0), (1, 10)]


def test_uses_kept_for_half_their_lease_are_given_back_and_taken_anew():
    shards = [Shard(0), Shard(1)]
    shards[0].put(0)
    waiting = threading.Thread(target=lambda: lease(leasing_from(shards), 2, lease_s=0.02))
    waiting.start()
    wait_until(lambda: shards[0].info().samples >= 3, "the same use leased for the third time")
    shards[1].put(10)
    waiting.join(DEADLINE_S)
    assert [shard.info().num_leased for shard in shards] == [1, 1]


def test_named_captures_come_in_their_order_from_the_shards_that_the_plan_says():
    shards = [Shard(0), Shard(1)]
    shards[0].put(2, 4)
    shards[1].put(3, 5)
    assert [shard_of(capture, 2) for capture in (2, 3)] == [0, 1]
    leasing = leasing_from(shards)
    assert places(lease(leasing, 0, (4, 3, 2, 5))) == [(0, 4), (1, 3), (0, 2), (1, 5)]


def test_sealed_shards_give_what_is_left_and_then_nothing():
    shards = [Shard(0), Shard(1)]
    shards[0].put(0)
    shards[1].put(10)
    shards[0].seal()
    leasing = leasing_from(shards)
    with pytest.raises(DeadlineError, match=r"3 samples were not ready .* 0 ready, 2 leased"):
        lease(leasing, 3, timeout_s=0.05)  # shard 1 may still get another
    shards[1].seal()
    assert sorted(places(lease(leasing, 3))) == [(0, 0), (1, 10)]
    assert lease(leasing, 3) == []


def test_shard_that_is_away_is_waited_for_at_the_end_and_named():
    shards = [Shard(0), Shard(1)]
    shards[0].put(0)
    shards[1].put(10)
    for shard in shards:
        shard.seal()
    shards[1].is_away = True
    leasing = leasing_from(shards)
    assert places(lease(leasing, 1)) == [(0, 0)]
    with pytest.raises(ReplayUnavailableError, match="shard 1 is away"):
        lease(leasing, 1, timeout_s=0.05)
    shards[1].is_away = False
    assert places(lease(leasing, 2)) == [(1, 10)]


def test_wait_that_ends_early_gives_everything_back():
    shards = [Shard(0), Shard(1)]
    shards[0].put(0)
    stopped = threading.Event()
    stopped.set()
    assert lease(leasing_from(shards), 2, cancelled=stopped) == []
    assert shards[0].info().num_leased == 0


def test_each_shard_is_acked_for_itself_and_a_lost_one_holds_up_nothing():
    shards = [Shard(0), Shard(1)]
    shards[0].put(0)
    shards[1].put(10)
    leasing = leasing_from(shards)
    leases = lease(leasing, 2)
    shards[0].restart_empty()
    assert leasing.are_lost(leases, time.monotonic() + DEADLINE_S)
    leasing.ack(leases, 0)
    assert [shard.info().resident_bytes for shard in shards] == [0, 0]
    with pytest.raises(UnknownSampleError):
        leasing.ack([one for one in leases if one.shard == 1], 0)


def test_leases_beside_a_lost_one_are_ready_again_when_dropped():
    shards = [Shard(0), Shard(1)]
    shards[0].put(0)
    shards[1].put(10)
    leasing = leasing_from(shards)
    leases = lease(leasing, 2)
    shards[0].restart_empty()
    leasing.drop(leases, 0)
    assert (shards[1].info().num_ready, shards[1].info().num_leased) == (1, 0)


def test_priorities_reach_every_shard_although_one_is_away():
    shards = [Shard(0, reuse=2), Shard(1, reuse=2)]
    shards[1].put(10)
    heard: list[int] = []
    update = shards[1]._table.update_priorities
    shards[1]._table.update_priorities = lambda values: heard.append(update(values)) or heard[-1]
    shards[0].is_away = True
    with pytest.raises(ReplayUnavailableError):
        leasing_from(shards).update_priorities({0: 0.5, 10: 0.25})
    assert heard == [1]


def test_table_of_another_signature_is_refused_on_any_shard():
    shards = [Shard(0), Shard(1)]
    other = SIGNATURE.model_copy(update={"hidden_size": 8})
    leasing = Leasing([shard.link for shard in shards], "p", other)
    with pytest.raises(SignatureError, match="both must come from the same recipe"):
        lease(leasing, 1)


def test_infos_are_summed():
    shards = [Shard(0, capacity=3), Shard(1, capacity=4)]
    shards[0].put(0)
    shards[1].put(10, 11)
    shards[0].seal()
    info = sum_infos([shard.info() for shard in shards])
    assert (info.resident_bytes, info.peak_bytes, info.capacity_bytes) == tuple(SAMPLE_BYTES * n for n in (3, 3, 7))
    assert (info.num_ready, info.inserts, info.sealed) == (3, 3, False)


@settings(max_examples=25, deadline=None)
@given(
    num_shards=st.integers(1, 3),
    num_ranks=st.integers(1, 3),
    count=st.integers(1, 4),
    num_captures=st.integers(1, 24),
    reuse=st.integers(1, 2),
    min_size=st.integers(1, 3),
    error_buffer=st.none() | st.integers(6, 8),
    skew=st.integers(1, 4),
)
def test_ranks_that_compete_for_small_shards_get_every_use_once_and_come_to_an_end(
    num_shards, num_ranks, count, num_captures, reuse, min_size, error_buffer, skew
):
    limiter = RateLimiter.with_error_buffer(min_size, reuse, error_buffer)
    capacity = num_ranks * count  # all that the ranks may keep at once
    shards = [Shard(number, capacity, reuse, limiter) for number in range(num_shards)]
    routes = [(capture // skew) % num_shards for capture in range(num_captures)]
    trained: list[int] = []
    lock = threading.Lock()

    def fill(shard: Shard) -> None:
        for capture in range(num_captures):
            if routes[capture] == shard.number:
                job = make_job(capture, reuse)
                deadline_s = time.monotonic() + DEADLINE_S
                while shard.admit(job, SAMPLE_BYTES, 0.0) is Admission.FULL:
                    assert time.monotonic() < deadline_s
                    time.sleep(0.001)
                shard.commit_sample(job)

    def seal() -> None:
        for thread in filling:
            thread.join(DEADLINE_S)
        for shard in shards:
            shard.seal()

    def train() -> None:
        leasing = leasing_from(shards)
        while leases := lease(leasing, count):
            with lock:
                trained.extend(one.use for one in leases)
            leasing.ack(leases, 0)

    filling = [threading.Thread(target=fill, args=(shard,)) for shard in shards]
    threads = [*filling, threading.Thread(target=seal), *(threading.Thread(target=train) for _ in range(num_ranks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * DEADLINE_S)
    assert sorted(trained) == list(range(num_captures * reuse))
    assert all(shard.info().resident_bytes == 0 for shard in shards)
