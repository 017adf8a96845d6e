import pytest
import torch

from services.contracts import CaptureJob, Sample, SampleLease
from services.replay.reader import CapturedSample
from trainer.collate import collate

HIDDEN, WIDTH = 2, 4


def make_sample(length: int, last_rows: list[int], fill: float) -> CapturedSample:
    job = CaptureJob(capture=length, prompt=0, epoch=0, input_ids=(), loss_mask=(), last_rows=())
    sample = Sample(job=job, chunks=(), num_bytes=0, target="")
    return CapturedSample(
        lease=SampleLease(lease_id=str(length), use=length, k=0, sample=sample),
        input_ids=torch.arange(1, length + 1),
        loss_mask=torch.tensor([0] + [1] * (length - 1)),
        context=torch.full((length, WIDTH), fill, dtype=torch.bfloat16),
        last_rows=torch.tensor(last_rows),
        last=torch.full((len(last_rows), HIDDEN), -fill, dtype=torch.bfloat16),
    )


def test_packed_samples_stand_end_to_end_without_padding() -> None:
    samples = [make_sample(2, [1], 1.0), make_sample(4, [1, 2], 3.0)]
    batch = collate(samples, [11, 12], context_width=WIDTH, hidden_size=HIDDEN)
    features = batch.features
    assert features.sample_lengths == (2, 4)
    assert features.input_ids.tolist() == [[1, 2, 1, 2, 3, 4]]
    assert features.loss_mask.int().tolist() == [[0, 1, 0, 1, 1, 1]]
    assert features.attention_mask.all()
    assert features.target_hidden_states[0, :, 0].tolist() == [1, 1, 3, 3, 3, 3]
    assert features.target_last_hidden_states[0, :, 1].tolist() == [0, -1, 0, -3, -3, 0]
    assert features.target_hidden_states.dtype == torch.bfloat16
    assert batch.sample_weights.tolist() == [1.0, 1.0]
    assert batch.anchor_seeds == (11, 12)
    assert [lease.use for lease in batch.leases] == [2, 4]
    assert batch.num_tokens == 6
    assert batch.to(torch.device("cpu"), torch.float32).features.sample_lengths == (2, 4)


def test_an_empty_micro_batch_has_one_sample_of_weight_zero() -> None:
    batch = collate([], [], context_width=WIDTH, hidden_size=HIDDEN)
    assert len(batch.features.samples) == len(batch.anchor_seeds) == 1
    assert batch.sample_weights.tolist() == [0.0]
    assert batch.importance_weights.tolist() == [1.0]
    assert batch.num_tokens == 0


def test_features_come_to_the_drafters_dtype_on_the_device() -> None:
    batch = collate([make_sample(3, [1], 1.5)], [5], context_width=WIDTH, hidden_size=HIDDEN)
    moved = batch.to(torch.device("cpu"), torch.float32)
    assert moved.features.target_hidden_states.dtype == torch.float32
    assert moved.features.target_last_hidden_states.dtype == torch.float32
    assert moved.features.target_hidden_states[0, 0, 0] == pytest.approx(1.5)
    assert moved.leases == batch.leases


def test_importance_comes_with_the_lease() -> None:
    samples = [make_sample(2, [1], 1.0), make_sample(3, [1], 1.0)]
    lease = samples[1].lease.model_copy(update={"importance": 0.25})
    batch = collate([samples[0], samples[1]._replace(lease=lease)], [1, 2], context_width=WIDTH, hidden_size=HIDDEN)
    assert batch.importance_weights.tolist() == [1.0, 0.25]
    assert batch.sample_weights.tolist() == [1.0, 1.0]
