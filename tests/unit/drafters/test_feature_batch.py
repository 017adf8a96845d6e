import pytest
import torch

from drafters import FeatureBatch

GOOD = {
    "input_ids": torch.zeros(2, 3, dtype=torch.int32),
    "loss_mask": torch.ones(2, 3, dtype=torch.uint8),
    "attention_mask": torch.ones(2, 3),
    "target_hidden_states": torch.zeros(2, 3, 8),
    "target_last_hidden_states": torch.zeros(2, 3, 4),
}


def test_ids_become_int64_and_masks_bool():
    batch = FeatureBatch.from_tensors(**GOOD)
    assert batch.input_ids.dtype == torch.int64
    assert batch.loss_mask.dtype == batch.attention_mask.dtype == torch.bool


def test_losses_are_averaged_over_the_padded_length_unless_said_otherwise():
    assert FeatureBatch.from_tensors(**GOOD).loss_lengths.tolist() == [3.0, 3.0]
    assert FeatureBatch.from_tensors(**GOOD, loss_lengths=torch.tensor([2, 3])).loss_lengths.tolist() == [2.0, 3.0]
    with pytest.raises(ValueError, match=r"loss_lengths is \[3\], but there are 2 samples"):
        FeatureBatch.from_tensors(**GOOD, loss_lengths=torch.ones(3))


def test_nothing_is_padding_without_an_attention_mask():
    assert FeatureBatch.from_tensors(**(GOOD | {"attention_mask": None})).attention_mask.all()


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("input_ids", torch.zeros(3), r"input_ids must be \[B, T\], neither of them 0, got \[3\]"),
        ("input_ids", torch.zeros(0, 3), r"neither of them 0, got \[0, 3\]"),
        ("input_ids", torch.zeros(2, 0), r"neither of them 0, got \[2, 0\]"),
        ("loss_mask", torch.zeros(2, 4), r"loss_mask is \[2, 4\], but input_ids is \[2, 3\]"),
        ("attention_mask", torch.zeros(2), r"attention_mask is \[2\]"),
        ("target_hidden_states", torch.zeros(2, 4, 8), r"target_hidden_states is \[2, 4, 8\]"),
        ("target_last_hidden_states", torch.zeros(6, 4), r"target_last_hidden_states is \[6, 4\]"),
    ],
)
def test_tensor_of_another_shape_is_refused_by_name(name, tensor, message):
    with pytest.raises(ValueError, match=message):
        FeatureBatch.from_tensors(**(GOOD | {name: tensor}))


@pytest.mark.parametrize(("rows", "lengths"), [(1, (3, 1)), (1, (5, 0)), (2, (5, 5))])
def test_packed_samples_must_fill_the_only_row(rows, lengths):
    ids, features = torch.ones(rows, 5), torch.zeros(rows, 5, 2)
    with pytest.raises(ValueError, match="do not fill input_ids"):
        FeatureBatch.from_tensors(ids, ids, None, features, features, sample_lengths=lengths)


def test_samples_are_rows_or_packed_pieces():
    ids, features = torch.ones(2, 3), torch.zeros(2, 3, 2)
    assert FeatureBatch.from_tensors(ids, ids, None, features, features).samples == ((0, 3), (3, 6))
    ids, features = torch.ones(1, 5), torch.zeros(1, 5, 2)
    batch = FeatureBatch.from_tensors(ids, ids, None, features, features, sample_lengths=(2, 3))
    assert batch.samples == batch.to("cpu").samples == ((0, 2), (2, 5))


def test_a_number_for_each_sample_is_one_unless_given():
    batch = FeatureBatch.from_tensors(**GOOD)
    assert batch.per_sample(None, "weights").tolist() == [1.0, 1.0]
    given = batch.per_sample(torch.tensor([2, 0]), "weights")
    assert given.dtype == torch.float32
    assert given.tolist() == [2.0, 0.0]


@pytest.mark.parametrize("values", [torch.ones(1), torch.ones(3), torch.ones(2, 1)])
def test_more_or_fewer_numbers_than_samples_are_refused(values):
    with pytest.raises(ValueError, match=r"weights is \[.*\], but there are 2 samples"):
        FeatureBatch.from_tensors(**GOOD).per_sample(values, "weights")
