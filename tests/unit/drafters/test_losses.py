import math

import pytest
import torch

from drafters.losses import confidence_loss, normalizer, row_losses, slot_weights


def test_row_losses_by_hand():
    draft = torch.tensor([[math.log(0.5), math.log(0.3), math.log(0.2)]])
    target = torch.tensor([[math.log(0.1), math.log(0.6), math.log(0.3)]]) + 5  # a constant changes no distribution
    terms = row_losses(draft, target, torch.tensor([1]))
    assert terms.cross_entropy.item() == pytest.approx(-math.log(0.3), rel=1e-5)
    assert terms.l1.item() == pytest.approx(0.4 + 0.3 + 0.1, rel=1e-5)
    assert terms.acceptance.item() == pytest.approx(1 - 0.4, rel=1e-5)


def test_acceptance_is_one_for_equal_and_zero_for_disjoint_distributions():
    logits = torch.tensor([[0.0, 0.0], [60.0, -60.0]])
    terms = row_losses(logits, torch.tensor([[0.0, 0.0], [-60.0, 60.0]]), torch.tensor([0, 0]))
    assert terms.acceptance.tolist() == [1.0, 0.0]


def test_row_losses_are_float32_and_acceptance_has_no_gradient_when_logits_are_bf16():
    draft = torch.randn(2, 4, dtype=torch.bfloat16, requires_grad=True)
    terms = row_losses(draft, torch.randn(2, 4, dtype=torch.bfloat16), torch.tensor([0, 1]))
    assert {term.dtype for term in terms} == {torch.float32}
    assert not terms.acceptance.requires_grad
    assert terms.l1.requires_grad


def test_slot_weights_decay_by_slot_and_scale_by_sample():
    mask = torch.tensor([[[1, 1, 0]], [[1, 0, 0]]]).bool()
    weights = slot_weights(mask, torch.tensor([1.0, 2.0]), 4.0)
    assert weights.tolist() == [[[1.0, pytest.approx(math.exp(-0.25)), 0.0]], [[2.0, 0.0, 0.0]]]


def test_normalizer_sums_over_ranks_and_is_never_zero():
    assert normalizer(torch.ones(1, 2, 2), lambda local: local + 3).item() == pytest.approx(7 + 1e-6)
    assert normalizer(torch.zeros(1, 2, 2), lambda local: local).item() == pytest.approx(1e-6)


def test_confidence_loss_is_binary_cross_entropy_against_a_probability():
    loss = confidence_loss(torch.tensor([0.0, 2.0]), torch.tensor([0.3, 1.0]))
    assert loss.tolist() == pytest.approx([math.log(2), math.log(1 + math.exp(-2))], rel=1e-5)
