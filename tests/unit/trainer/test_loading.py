"""From leases to micro-batches: what is leased when, which samples go together, and what goes back to the table."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from replaying import LeaseReader

from services.contracts import CaptureJob, Chunk, Sample, SampleLease, TableSignature
from services.errors import ReplayUnavailableError, UnknownSampleError
from trainer.collate import MicroBatch
from trainer.loading import MicroBatchLoader
from trainer.prefetch import Room
from trainer.recipe import Recipe

SIGNATURE = TableSignature(fingerprint="f", layer_ids=(0, 1), hidden_size=2, dtype="fp32")
TOKEN_BYTES = 6 * 4
PLENTY = 10_000 * TOKEN_BYTES


class FakeReader:
    """A buffer with samples of the given lengths ready, in this order; capture n has number n."""

    def __init__(self, *lengths: int, error: Exception | None = None) -> None:
        self.ready = list(enumerate(lengths))
        self.lengths = lengths
        self.error = error
        self.told: list[Mapping[int, float]] = []
        self.leased: list[list[int]] = []
        self.dropped: list[int] = []
        self.acked: list[int] = []
        self.gone: set[int] = set()
        self.lost: set[int] = set()

    def update_priorities(self, rejections: Mapping[int, float]) -> None:
        self.told.append(rejections)
        if self.error:
            raise self.error

    def lease(
        self, *, count: int, captures: Sequence[int] | None, cancelled: threading.Event, **_: object
    ) -> list[SampleLease]:
        if captures is not None:
            taken = [(capture, self.lengths[capture]) for capture in captures]
        elif len(self.ready) < count and cancelled.is_set():
            taken = []
        else:  # a sealed table gives what it has
            taken, self.ready = self.ready[:count], self.ready[count:]
        self.leased.append([capture for capture, _ in taken])
        return [make_lease(*item) for item in taken]

    def reading(self, lease: SampleLease) -> AbstractContextManager[LeaseReader]:
        return LeaseReader.by(self.read_into)(lease)

    def read_into(self, lease: SampleLease, index: int, place: memoryview) -> None:
        if lease.use in self.gone:
            raise UnknownSampleError("gone")
        place[:] = bytes([lease.use]) * len(place)

    def are_lost(self, leases: Iterable[SampleLease], deadline_s: float) -> bool:
        return any(lease.use in self.lost for lease in leases)

    def drop(self, leases: Iterable[SampleLease], generation: int) -> None:
        self.dropped += [lease.use for lease in leases]

    def ack(self, leases: Iterable[SampleLease], generation: int, *, timeout_s: float) -> None:
        self.acked += [lease.use for lease in leases]


def make_lease(capture: int, length: int = 3) -> SampleLease:
    job = CaptureJob(
        capture=capture, prompt=0, epoch=0, input_ids=(1,) * length, loss_mask=(0,) * length, last_rows=(1,)
    )
    chunks = (
        Chunk(tensor="context", row_start=0, row_end=length, num_bytes=length * 16, crc32c=0),
        Chunk(tensor="last", row_start=0, row_end=1, num_bytes=8, crc32c=0),
    )
    sample = Sample(job=job, chunks=chunks, num_bytes=0, target="")
    return SampleLease(lease_id=f"x.{capture}", use=capture, k=0, sample=sample, importance=1 / (capture + 1))


def make_loader(
    reader: FakeReader,
    tmp_path: Path,
    samples: int = 3,
    hold: Callable[[Sequence[SampleLease]], bool] = lambda _: True,
) -> MicroBatchLoader:
    recipe = Recipe.model_validate(
        {
            "target": {"model": str(tmp_path)},
            "prompts": {"source": "p"},
            "trainer": {"micro_batch_size": samples, "global_batch_size": samples * 12},
        }
    )
    return MicroBatchLoader(
        reader,  # type: ignore[arg-type]
        recipe,
        SIGNATURE,
        rank=0,
        generation=1,
        device=torch.device("cpu"),
        dtype=torch.float32,
        hold=hold,
    )


def load(loader: MicroBatchLoader, num_left: int = 1, room: Room | None = None) -> MicroBatch:
    return loader.load(None, num_left, room or Room(PLENTY))


def uses(micro_batch: MicroBatch) -> list[int]:
    return [lease.use for lease in micro_batch.leases]


def test_rejections_go_back_by_capture_without_what_was_not_scored(tmp_path: Path) -> None:
    reader = FakeReader(3, 3, 3)
    loader = make_loader(reader, tmp_path)
    loader.update_priorities(load(loader), torch.tensor([0.25, float("nan"), 1.0]))
    assert reader.told == [{0: 0.25, 2: 1.0}]


def test_importance_of_the_leases_reaches_the_micro_batch(tmp_path: Path) -> None:
    assert load(make_loader(FakeReader(3, 3, 3), tmp_path)).importance_weights.tolist() == [1, 0.5, torch.tensor(1 / 3)]


def test_padding_says_nothing(tmp_path: Path) -> None:
    reader = FakeReader()
    loader = make_loader(reader, tmp_path)
    empty = load(loader)
    assert empty.num_tokens == 0
    loader.update_priorities(empty, torch.tensor([float("nan")]))
    loader.ack(empty)
    assert (reader.told, reader.acked) == ([], [])


def test_lost_redis_costs_priorities_and_nothing_else(tmp_path: Path) -> None:
    reader = FakeReader(3, 3, 3, error=ReplayUnavailableError("away"))
    loader = make_loader(reader, tmp_path)
    loader.update_priorities(load(loader), torch.tensor([0.1, 0.2, 0.3]))
    assert len(reader.told) == 1


def test_samples_that_are_ready_together_go_together_by_length(tmp_path: Path) -> None:
    """Two passes of two: 9 with 2 and 8 with 3, the heavier first; then the next step's, which nothing is kept for."""
    reader = FakeReader(9, 8, 2, 3, 5, 6)
    loader = make_loader(reader, tmp_path, samples=2)
    batches = [load(loader, num_left) for num_left in (2, 1, 1)]
    assert [uses(batch) for batch in batches] == [[0, 2], [1, 3], [4, 5]]
    assert [batch.num_tokens for batch in batches] == [11, 11, 11]
    assert reader.leased == [[0, 1], [2, 3], [4, 5]]
    loader.ack(batches[0])
    assert reader.acked == [0, 2]


def test_pass_of_one_sample_is_the_longest_that_is_ready(tmp_path: Path) -> None:
    loader = make_loader(FakeReader(3, 9, 5), tmp_path, samples=1)
    assert [uses(load(loader, num_left)) for num_left in (3, 2, 1)] == [[1], [2], [0]]


def test_nothing_is_waited_for_beyond_the_next_pass(tmp_path: Path) -> None:
    """Three samples are ready: the second pass would need a fourth, so it is leased when its turn comes."""
    reader = FakeReader(1, 2, 9)
    loader = make_loader(reader, tmp_path, samples=2)
    assert uses(load(loader, num_left=2)) == [0, 1]
    reader.ready.append((3, 4))
    assert uses(load(loader, num_left=1)) == [2, 3]
    assert reader.leased == [[0, 1], [], [2, 3]]


def test_no_more_is_leased_than_has_room_ahead_of_the_step(tmp_path: Path) -> None:
    reader, room = FakeReader(10, 10, 10, 10, 10, 10), Room(25 * TOKEN_BYTES)
    loader = make_loader(reader, tmp_path, samples=1)
    first = load(loader, 6, room)
    assert reader.leased == [[0], [1], [2]], "20 of 25 leave room for a third, and 30 for no fourth"
    room.add(first.num_bytes)
    room.add(load(loader, 5, room).num_bytes)
    assert len(reader.leased) == 3
    taken = threading.Timer(0.05, lambda: room.remove(first.num_bytes))
    taken.start()
    assert uses(load(loader, 4, room)) == [2], "the third waits until the loop has taken the first"
    taken.join()


def test_end_of_the_plan_is_a_short_pass_and_then_padding(tmp_path: Path) -> None:
    reader = FakeReader(4, 7, 5)
    loader = make_loader(reader, tmp_path, samples=2)
    batches = [load(loader, num_left) for num_left in (1, 1, 1)]
    assert [uses(batch) for batch in batches] == [[0, 1], [2], []]


def test_named_captures_are_taken_as_they_are_named(tmp_path: Path) -> None:
    reader = FakeReader(1, 2, 3, 4)
    loader = make_loader(reader, tmp_path, samples=2)
    assert uses(loader.load((1, 3), 2, Room(PLENTY))) == [1, 3]
    assert uses(loader.load((), 1, Room(PLENTY))) == []
    assert reader.leased == [[1, 3]]


def test_samples_lost_with_their_table_are_passed_over(tmp_path: Path) -> None:
    """Sample 1 went with its shard; 0 is still there and goes back, the next two take their place."""
    reader = FakeReader(3, 3, 4, 4)
    reader.gone = reader.lost = {1}
    assert uses(load(make_loader(reader, tmp_path, samples=2))) == [2, 3]
    assert reader.dropped == [0, 1]


def test_sample_that_is_gone_from_a_table_that_stands_ends_the_run(tmp_path: Path) -> None:
    reader = FakeReader(3, 3)
    reader.gone = {1}
    with pytest.raises(UnknownSampleError):
        load(make_loader(reader, tmp_path, samples=2))


def test_samples_that_do_not_count_any_more_are_passed_over(tmp_path: Path) -> None:
    answers = iter([False, True])
    loader = make_loader(reader := FakeReader(3, 4), tmp_path, samples=1, hold=lambda _: next(answers))
    assert uses(load(loader)) == [1]
    assert reader.dropped == [0]


def test_closed_room_ends_the_wait_for_samples(tmp_path: Path) -> None:
    reader, room = FakeReader(3), Room(PLENTY)
    room.close()
    assert uses(load(make_loader(reader, tmp_path, samples=1), room=room)) == []
    assert reader.leased == []
