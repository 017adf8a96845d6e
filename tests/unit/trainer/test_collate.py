import torch

from services.contracts import CaptureJob, Sample, SampleLease
from trainer.collate import packed, without_samples


def make_lease(length: int, importance: float = 1.0) -> SampleLease:
    job = CaptureJob(
        capture=length,
        prompt=0,
        epoch=0,
        input_ids=tuple(range(1, length + 1)),
        loss_mask=(0,) + (1,) * (length - 1),
        last_rows=(),
    )
    sample = Sample(job=job, chunks=(), num_bytes=0, target="")
    return SampleLease(lease_id=str(length), use=length, k=0, sample=sample, importance=importance)


def test_packed_samples_stand_end_to_end_without_padding() -> None:
    context, last = torch.rand(1, 6, 4), torch.rand(1, 6, 2)
    batch = packed([make_lease(2), make_lease(4)], [11, 12], context, last)
    features = batch.features
    assert features.sample_lengths == (2, 4)
    assert features.input_ids.tolist() == [[1, 2, 1, 2, 3, 4]]
    assert features.loss_mask.int().tolist() == [[0, 1, 0, 1, 1, 1]]
    assert features.attention_mask.all()
    assert features.target_hidden_states is context
    assert features.target_last_hidden_states is last
    assert batch.sample_weights.tolist() == [1.0, 1.0]
    assert batch.anchor_seeds == (11, 12)
    assert [lease.use for lease in batch.leases] == [2, 4]
    assert (batch.num_tokens, batch.num_bytes) == (6, 6 * (4 + 2) * 4)


def test_a_micro_batch_without_samples_has_one_of_weight_zero() -> None:
    batch = without_samples(4, 2, torch.bfloat16)
    assert len(batch.features.samples) == len(batch.anchor_seeds) == 1
    assert batch.features.target_hidden_states.dtype == torch.bfloat16
    assert batch.sample_weights.tolist() == [0.0]
    assert batch.importance_weights.tolist() == [1.0]
    assert batch.num_tokens == 0


def test_importance_comes_with_the_lease() -> None:
    leases = [make_lease(2), make_lease(3, importance=0.25)]
    batch = packed(leases, [1, 2], torch.zeros(1, 5, 4), torch.zeros(1, 5, 2))
    assert batch.importance_weights.tolist() == [1.0, 0.25]
    assert batch.sample_weights.tolist() == [1.0, 1.0]
