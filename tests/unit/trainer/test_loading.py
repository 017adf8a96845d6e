"""What goes back to the table after a micro-batch: its samples' rejections, by capture."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path

import torch

from services.contracts import CaptureJob, Sample, SampleLease, TableSignature
from services.errors import ReplayUnavailableError
from services.replay.reader import CapturedSample
from trainer.collate import MicroBatch, collate
from trainer.loading import MicroBatchLoader
from trainer.recipe import Recipe

SIGNATURE = TableSignature(fingerprint="f", layer_ids=(0, 1), hidden_size=2, dtype="fp32")


class FakeReader:
    """Notes what it is told."""

    def __init__(self, error: Exception | None = None) -> None:
        self.told: list[Mapping[int, float]] = []
        self.error = error

    def update_priorities(self, rejections: Mapping[int, float]) -> None:
        self.told.append(rejections)
        if self.error:
            raise self.error

    def take(self, *, count: int, **_: object) -> list[CapturedSample]:
        return [make_sample(capture, 1 / (capture + 1)) for capture in range(count)]


def make_sample(capture: int, importance: float) -> CapturedSample:
    job = CaptureJob(capture=capture, prompt=0, epoch=0, input_ids=(1, 2, 3), loss_mask=(0, 1, 1), last_rows=(1,))
    sample = Sample(job=job, chunks=(), num_bytes=0, target="")
    return CapturedSample(
        lease=SampleLease(lease_id=f"x.{capture}", use=capture, k=0, sample=sample, importance=importance),
        input_ids=torch.tensor(job.input_ids),
        loss_mask=torch.tensor(job.loss_mask),
        context=torch.zeros(3, 4),
        last_rows=torch.tensor([1]),
        last=torch.zeros(1, 2),
    )


def make_loader(reader: FakeReader, tmp_path: Path) -> MicroBatchLoader:
    recipe = Recipe.model_validate(
        {
            "target": {"model": str(tmp_path)},
            "prompts": {"source": "p"},
            "trainer": {"micro_batch_size": 3, "global_batch_size": 3},
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
        hold=lambda _: True,
    )


def load(loader: MicroBatchLoader) -> MicroBatch:
    return loader.load(None, threading.Event())


def test_rejections_go_back_by_capture_without_what_was_not_scored(tmp_path: Path) -> None:
    reader = FakeReader()
    loader = make_loader(reader, tmp_path)
    loader.update_priorities(load(loader), torch.tensor([0.25, float("nan"), 1.0]))
    assert reader.told == [{0: 0.25, 2: 1.0}]


def test_importance_of_the_leases_reaches_the_micro_batch(tmp_path: Path) -> None:
    assert load(make_loader(FakeReader(), tmp_path)).importance_weights.tolist() == [1.0, 0.5, torch.tensor(1 / 3)]


def test_padding_says_nothing(tmp_path: Path) -> None:
    reader = FakeReader()
    empty = collate([], [], context_width=4, hidden_size=2)
    make_loader(reader, tmp_path).update_priorities(empty, torch.tensor([float("nan")]))
    assert reader.told == []


def test_lost_redis_costs_priorities_and_nothing_else(tmp_path: Path) -> None:
    reader = FakeReader(ReplayUnavailableError("away"))
    loader = make_loader(reader, tmp_path)
    loader.update_priorities(load(loader), torch.tensor([0.1, 0.2, 0.3]))
    assert len(reader.told) == 1
