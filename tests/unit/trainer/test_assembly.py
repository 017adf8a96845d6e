"""What is read in place is what packing with `torch.cat` gave, bit for bit."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from packing_reference import collate
from replaying import LeaseReader
from torch import Tensor

from services.codec import byte_view, decode, encode_into
from services.contracts import (
    CaptureJob,
    Chunk,
    Sample,
    SampleLease,
    TableSignature,
    TensorName,
    WireDtype,
    hidden_state_bytes,
)
from services.errors import UnknownSampleError
from services.replay.reader import CapturedSample
from trainer.assembly import Assembler
from trainer.collate import MicroBatch

HIDDEN, LAYER_IDS = 4, (0, 2)
CPU = torch.device("cpu")


def signature_of(dtype: WireDtype) -> TableSignature:
    return TableSignature(fingerprint="f", layer_ids=LAYER_IDS, hidden_size=HIDDEN, dtype=dtype)


class Store:
    """Samples with features of their own, in chunks."""

    def __init__(self, dtype: WireDtype) -> None:
        self.signature = signature_of(dtype)
        self.payloads: dict[tuple[int, int], bytes] = {}
        self.read: list[tuple[int, int]] = []

    def add(self, capture: int, length: int, last_rows: Sequence[int], chunk_rows: int = 3) -> CapturedSample:
        generator = torch.Generator().manual_seed(capture)
        dtype = self.signature.dtype
        widths = {"context": len(LAYER_IDS) * HIDDEN, "last": HIDDEN}
        payloads: dict[TensorName, Tensor] = {}
        for name, num_rows in (("context", length), ("last", len(last_rows))):
            states = torch.randn(num_rows * widths[name] // HIDDEN, HIDDEN, generator=generator)
            packed = torch.empty(len(states), hidden_state_bytes(HIDDEN, dtype), dtype=torch.uint8)
            encode_into(packed, states, dtype)
            payloads[name] = packed.view(num_rows, -1) if num_rows else packed
        chunks: list[Chunk] = []
        for name, payload in payloads.items():
            for start in range(0, len(payload), chunk_rows):
                rows = payload[start : start + chunk_rows]
                self.payloads[capture, len(chunks)] = bytes(byte_view(rows))
                chunks.append(
                    Chunk(tensor=name, row_start=start, row_end=start + len(rows), num_bytes=rows.nbytes, crc32c=0)
                )
        job = CaptureJob(
            capture=capture,
            prompt=capture,
            epoch=0,
            input_ids=tuple(torch.randint(0, 99, (length,), generator=generator).tolist()),
            loss_mask=tuple(torch.randint(0, 2, (length,), generator=generator).tolist()),
            last_rows=tuple(last_rows),
        )
        sample = Sample(job=job, chunks=tuple(chunks), num_bytes=0, target="")
        return CapturedSample(
            lease=SampleLease(lease_id=f"x.{capture}", use=capture, k=0, sample=sample, importance=1 / (1 + capture)),
            input_ids=torch.tensor(job.input_ids),
            loss_mask=torch.tensor(job.loss_mask),
            context=decode(byte_view(payloads["context"]), dtype, widths["context"], hidden_size=HIDDEN),
            last_rows=torch.tensor(last_rows, dtype=torch.long),
            last=decode(byte_view(payloads["last"]), dtype, widths["last"], hidden_size=HIDDEN),
        )

    def read_into(self, lease: SampleLease, index: int, place: memoryview) -> None:
        capture = lease.sample.job.capture
        self.read.append((capture, index))
        if (capture, index) not in self.payloads:
            raise UnknownSampleError("gone")
        place[:] = self.payloads[capture, index]

    def assembler(self, dtype: torch.dtype) -> Assembler:
        return Assembler(LeaseReader.by(self.read_into), self.signature, device=CPU, dtype=dtype)


def assert_same(ours: MicroBatch, reference: MicroBatch) -> None:
    for name in ("input_ids", "loss_mask", "attention_mask", "loss_lengths"):
        assert torch.equal(getattr(ours.features, name), getattr(reference.features, name)), name
    for name in ("target_hidden_states", "target_last_hidden_states"):
        mine, theirs = getattr(ours.features, name), getattr(reference.features, name)
        assert mine.dtype == theirs.dtype
        assert bytes(byte_view(mine)) == bytes(byte_view(theirs)), name
    assert torch.equal(ours.sample_weights, reference.sample_weights)
    assert torch.equal(ours.importance_weights, reference.importance_weights)
    for name in ("anchor_seeds", "leases", "num_tokens", "num_bytes"):
        assert getattr(ours, name) == getattr(reference, name)
    assert ours.features.sample_lengths == reference.features.sample_lengths


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("wire_dtype", ["bf16", "fp16", "fp32", "fp8_e4m3"])
@given(
    shapes=st.lists(st.tuples(st.integers(2, 20), st.integers(1, 6), st.integers()), min_size=1, max_size=4),
)
def test_packed_in_place_is_what_cat_made(
    wire_dtype: WireDtype, dtype: torch.dtype, shapes: list[tuple[int, int, int]]
) -> None:
    store = Store(wire_dtype)
    samples = [
        store.add(number, length, [row for row in range(length) if random.Random(seed + row).random() < 0.7], rows)
        for number, (length, rows, seed) in enumerate(shapes)
    ]
    seeds = list(range(len(samples)))
    ours = store.assembler(dtype).assemble([sample.lease for sample in samples], seeds)
    assert_same(ours, collate(samples, seeds, dtype))
    assert sorted(store.read) == sorted(store.payloads)  # each chunk once


def test_second_micro_batch_in_the_same_memory_has_nothing_of_the_first() -> None:
    store = Store("bf16")
    long, short = store.add(1, 9, [2, 3, 4, 5, 6, 7, 8]), store.add(2, 8, [6])
    assembler = store.assembler(torch.bfloat16)
    first = assembler.assemble([long.lease], [1])
    place = first.features.target_hidden_states.data_ptr()
    assembler.release(first)
    second = assembler.assemble([short.lease], [2])
    assert second.features.target_hidden_states.data_ptr() == place
    assert_same(second, collate([short], [2], torch.bfloat16))


def test_memory_is_not_used_again_before_its_micro_batch_is_released() -> None:
    store = Store("fp32")
    samples = [store.add(number, 7, [3, 4]) for number in range(3)]
    assembler = store.assembler(torch.float32)
    batches = [assembler.assemble([sample.lease], [0]) for sample in samples]
    for batch, sample in zip(batches, samples, strict=True):
        assert_same(batch, collate([sample], [0], torch.float32))


def test_features_of_the_drafters_dtype_are_read_to_where_they_are_trained_from() -> None:
    store, places = Store("bf16"), []
    sample = store.add(1, 6, [2, 3, 4], chunk_rows=4)

    def read_into(lease: SampleLease, index: int, place: memoryview) -> None:
        places.append(torch.frombuffer(place, dtype=torch.uint8).data_ptr())
        store.read_into(lease, index, place)

    batch = Assembler(LeaseReader.by(read_into), store.signature, device=CPU, dtype=torch.bfloat16).assemble(
        [sample.lease], [0]
    )
    context, last = batch.features.target_hidden_states[0], batch.features.target_last_hidden_states[0]
    assert places == [context[0].data_ptr(), context[4].data_ptr(), last[2].data_ptr()]


def test_sample_that_is_gone_costs_no_memory() -> None:
    store = Store("bf16")
    samples = [store.add(number, 6, [2, 3]) for number in range(2)]
    assembler = store.assembler(torch.bfloat16)
    kept = assembler.assemble([samples[0].lease], [0])
    place = kept.features.target_hidden_states.data_ptr()
    assembler.release(kept)
    payload = store.payloads.pop((1, 1))
    with pytest.raises(UnknownSampleError):
        assembler.assemble([samples[1].lease], [1])
    store.payloads[1, 1] = payload
    batch = assembler.assemble([samples[1].lease], [1])
    assert batch.features.target_hidden_states.data_ptr() == place
    assert_same(batch, collate([samples[1]], [1], torch.bfloat16))


def test_padding_has_the_shapes_of_a_sample() -> None:
    features = Store("bf16").assembler(torch.float32).empty().features
    assert features.target_hidden_states.shape[-1] == len(LAYER_IDS) * HIDDEN
    assert features.target_last_hidden_states.shape[-1] == HIDDEN
    assert features.target_hidden_states.dtype == torch.float32


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("wire_dtype", ["bf16", "fp8_e4m3"])
def test_on_cuda_micro_batches_are_copied_from_memory_that_is_used_again(wire_dtype: WireDtype) -> None:
    device = torch.device("cuda", 0)
    store = Store(wire_dtype)
    samples = [store.add(number, 40 + number, list(range(5, 30)), chunk_rows=7) for number in range(12)]
    read = LeaseReader.by(store.read_into)
    assembler = Assembler(read, store.signature, device=device, dtype=torch.bfloat16)
    batches = [assembler.assemble([sample.lease], [number]) for number, sample in enumerate(samples)]
    for number, (batch, sample) in enumerate(zip(batches, samples, strict=True)):
        batch.wait_until_there()
        assert batch.buffer is None
        assert batch.features.target_hidden_states.device == batch.sample_weights.device == device
        on_host = replace(
            batch,
            features=batch.features.to("cpu"),
            sample_weights=batch.sample_weights.cpu(),
            importance_weights=batch.importance_weights.cpu(),
        )
        assert_same(on_host, collate([sample], [number], torch.bfloat16))
    assert assembler.empty().features.target_hidden_states.device == device
