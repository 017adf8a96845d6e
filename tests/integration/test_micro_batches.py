"""Micro-batches from a real buffer: leased, read in place ahead of the step, and never overwritten under it."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from packing_reference import collate

from drafters import FeatureBatch
from services.codec import byte_view, encode_into
from services.contracts import CaptureJob, Chunk, Sample, StepLease, TableSignature, TensorName, hidden_state_bytes
from services.replay.connect import Client, connect
from services.replay.embedded import EmbeddedRedis
from services.replay.reader import ReplayReader
from services.replay.rules import Admission
from services.replay.table import RedisTable
from trainer.collate import MicroBatch
from trainer.depth import needed_buffer_bytes, prefetch_bytes
from trainer.loading import MicroBatchLoader
from trainer.prefetch import Prefetcher
from trainer.recipe import Recipe

PREFIX = "run"
HIDDEN, LAYER_IDS = 8, (0, 1, 2)
MAX_LENGTH = 24
CHUNK_ROWS = 5
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
WAIT_S = 240.0
LATE_REFUSALS = 50


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedRedis]:
    with EmbeddedRedis.start(tmp_path_factory.mktemp("redis"), 10_000_000) as running:
        yield running


@pytest.fixture
def client(embedded: EmbeddedRedis) -> Iterator[Client]:
    client = connect(embedded.url)
    yield client
    client.flushdb()


def make_recipe(folder: Path, wire_dtype: str, **trainer: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "target": {"model": str(folder)},
            "prompts": {"source": "p", "max_length": MAX_LENGTH},
            "replay": {"wire_dtype": wire_dtype},
            "trainer": {"wait_s": WAIT_S} | trainer,
        }
    )


def signature_of(recipe: Recipe) -> TableSignature:
    return TableSignature(fingerprint="f", layer_ids=LAYER_IDS, hidden_size=HIDDEN, dtype=recipe.replay.wire_dtype)


def make_job(capture: int) -> CaptureJob:
    """Lengths between 2 and the longest, in no order."""
    length = 2 + capture * 7 % (MAX_LENGTH - 1)
    loss_mask = tuple(int(row % 5 > 1) for row in range(length))
    return CaptureJob(
        capture=capture,
        prompt=capture,
        epoch=0,
        input_ids=tuple(range(capture, capture + length)),
        loss_mask=loss_mask,
        last_rows=tuple(row for row in range(length - 1) if loss_mask[row] and loss_mask[row + 1]),
    )


def insert(table: RedisTable, signature: TableSignature, job: CaptureJob) -> bool:
    """Store a sample as a shard does; False if the buffer is full."""
    if table.admit(job, signature.reserved_bytes(job), time.time()) is not Admission.ADMITTED:
        return False
    generator = torch.Generator().manual_seed(job.capture)
    chunks: list[Chunk] = []
    tensors: tuple[tuple[TensorName, int, int], ...] = (
        ("context", job.num_tokens, len(LAYER_IDS)),
        ("last", len(job.last_rows), 1),
    )
    with table.writing(job) as writer:
        for name, num_rows, num_states in tensors:
            for start in range(0, num_rows, CHUNK_ROWS):
                end = min(start + CHUNK_ROWS, num_rows)
                states = torch.randn((end - start) * num_states, HIDDEN, generator=generator)
                packed = torch.empty(len(states), hidden_state_bytes(HIDDEN, signature.dtype), dtype=torch.uint8)
                encode_into(packed, states, signature.dtype)
                writer.write(len(chunks), byte_view(packed))
                chunks.append(Chunk(tensor=name, row_start=start, row_end=end, num_bytes=packed.nbytes, crc32c=0))
    num_bytes = sum(chunk.num_bytes for chunk in chunks)
    table.commit(Sample(job=job, chunks=tuple(chunks), num_bytes=num_bytes, target="here"), time.time())
    return True


class Steps:
    """Grants steps of so many micro-batches until END."""

    def __init__(self, num_steps: int, num_micro_batches: int) -> None:
        self._num_steps = num_steps
        self._num_micro_batches = num_micro_batches

    def step_lease(self, step: int) -> StepLease:
        return StepLease(step=step, num_micro_batches=self._num_micro_batches if step <= self._num_steps else 0)


def make_loader(reader: ReplayReader, recipe: Recipe, rank: int = 0) -> MicroBatchLoader:
    return MicroBatchLoader(
        reader,
        recipe,
        signature_of(recipe),
        rank=rank,
        generation=0,
        device=torch.device("cpu"),
        dtype=DTYPES[recipe.trainer.precision],
        hold=lambda _: True,
    )


def bits(features: FeatureBatch) -> list[bytes]:
    tensors = (features.input_ids, features.loss_mask, features.target_hidden_states)
    return [bytes(byte_view(tensor)) for tensor in (*tensors, features.target_last_hidden_states)]


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("wire_dtype", ["bf16", "fp8_e4m3"])
def test_micro_batches_stay_whole_while_the_next_ones_are_read(
    embedded: EmbeddedRedis, client: Client, tmp_path: Path, wire_dtype: str, precision: str
) -> None:
    """Each is compared when it comes and again, before its ack, when two more have been made beside it."""
    recipe = make_recipe(tmp_path, wire_dtype, precision=precision, micro_batch_size=2, global_batch_size=8)
    signature, table = signature_of(recipe), RedisTable(client, PREFIX)
    table.create(10_000_000, signature, 1)
    for capture in range(32):
        assert insert(table, signature, make_job(capture))
    table.seal()
    reader = ReplayReader(embedded.url, PREFIX, signature)
    loader = make_loader(reader, recipe)
    uses: list[int] = []
    held: deque[tuple[MicroBatch, list[bytes]]] = deque()

    def finish() -> None:
        batch, expected = held.popleft()
        assert bits(batch.features) == expected
        loader.ack(batch)

    depth_bytes = prefetch_bytes(recipe, signature)
    with Prefetcher(Steps(4, 4), loader.load, depth_bytes=depth_bytes, first_step=1, rank=0) as batches:
        for _, micro_batches in batches.steps():
            for batch in micro_batches:
                samples = [reader.fetch(lease) for lease in batch.leases]
                held.append((batch, bits(collate(samples, batch.anchor_seeds, DTYPES[precision]).features)))
                assert bits(batch.features) == held[-1][1]
                uses += [lease.use for lease in batch.leases]
                if len(held) == 3:
                    finish()
        while held:
            finish()
    reader.close()
    assert sorted(uses) == list(range(32))
    assert table.info().resident_bytes == 0


def test_ranks_in_lock_step_never_starve_each_other_in_the_smallest_buffer(
    embedded: EmbeddedRedis, client: Client, tmp_path: Path
) -> None:
    """No rank goes on before the other one has had this pass; the first has the buffer for itself until it is full."""
    num_steps, num_passes = 5, 6
    recipe = make_recipe(tmp_path, "bf16", world_size=2, micro_batch_size=2, global_batch_size=4 * num_passes)
    signature, table = signature_of(recipe), RedisTable(client, PREFIX)
    table.create(needed_buffer_bytes(recipe, signature), signature, 1)
    num_captures = num_steps * recipe.trainer.global_batch_size
    together = threading.Barrier(2, timeout=WAIT_S)
    uses: list[list[int]] = [[], []]
    failures: list[BaseException] = []

    def train(rank: int) -> None:
        reader = ReplayReader(embedded.url, PREFIX, signature)
        loader = make_loader(reader, recipe, rank)
        depth_bytes = prefetch_bytes(recipe, signature)
        try:
            steps = Steps(num_steps, num_passes)
            with Prefetcher(steps, loader.load, depth_bytes=depth_bytes, first_step=1, rank=rank) as batches:
                for _, micro_batches in batches.steps():
                    for batch in micro_batches:
                        together.wait()
                        uses[rank] += [lease.use for lease in batch.leases]
                        loader.ack(batch)
        except BaseException as error:
            failures.append(error)
            together.abort()
        reader.close()

    ranks = [threading.Thread(target=train, args=(rank,)) for rank in range(2)]
    ranks[0].start()
    num_refused = 0
    for capture in range(num_captures):
        job = make_job(capture)
        while not insert(table, signature, job) and not failures:
            time.sleep(0.01)
            num_refused += 1
            if num_refused == LATE_REFUSALS:  # the first rank has had the buffer for itself until it was full
                ranks[1].start()
    table.seal()
    for thread in ranks:
        thread.join(WAIT_S)
    assert not failures, failures
    assert sorted(uses[0] + uses[1]) == list(range(num_captures))
    info = table.info()
    assert (info.resident_bytes, info.num_leased) == (0, 0)
    assert info.peak_bytes <= info.capacity_bytes
