"""DFlash: cross-entropy alone, no heads, and what slot 0 does with and without `sample_from_anchor`."""

import dataclasses

import pytest
import torch
from one_sequence import OneSequence
from torch.nn import functional

from drafters.anchors import Anchors

SEEDS = [21, 22]


def anchors_at(*positions):
    return Anchors(torch.tensor([positions]), torch.ones(1, len(positions), dtype=torch.bool))


def observed(drafter, batch, num_rows):
    sequence = OneSequence(drafter)
    sequence.observe(batch.target_hidden_states[0, :num_rows], batch.input_ids[0, 1 : num_rows + 1])
    return sequence


def test_loss_is_cross_entropy_alone(make_drafter, make_batch):
    drafter, batch = make_drafter(algorithm="dflash"), make_batch(20, 14)
    out = drafter.training_forward(batch, anchor_seeds=SEEDS, return_logits=True)
    weights = out.eval_mask * torch.exp(-torch.arange(4) / 4.0)
    terms = functional.cross_entropy(out.draft_logits.flatten(0, 2), out.target_ids.flatten(), reduction="none")
    expected = (terms.view_as(weights) * weights).sum() / weights.sum()
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert out.metrics["loss"] == out.metrics["ce_loss"] == pytest.approx(out.loss.item(), rel=1e-5)
    assert "l1_loss" not in out.metrics
    assert out.confidence_pred is None
    assert not any(name.startswith("confidence") for name in out.metrics)


def test_target_distribution_counts_in_metrics_but_not_in_gradients(make_drafter, make_batch):
    drafter, batch = make_drafter(algorithm="dflash"), make_batch(20)
    other = dataclasses.replace(batch, target_last_hidden_states=-batch.target_last_hidden_states)
    results = []
    for given in (batch, other):
        drafter.zero_grad(set_to_none=True)
        out = drafter.training_forward(given, anchor_seeds=[1])
        out.loss.backward()
        results.append((out.metrics, drafter.fc.weight.grad.clone()))
    (first, first_gradient), (second, second_gradient) = results
    assert torch.equal(first_gradient, second_gradient)
    assert 0 < first["accept_rate@0"] < 1
    assert first["accept_rate@0"] != second["accept_rate@0"]
    assert first["tau_probabilistic"] > 1


def test_it_is_dspark_without_heads(make_drafter, make_batch):
    batch = make_batch(20, 14)
    dflash = make_drafter(algorithm="dflash")
    dspark = make_drafter(markov_rank=0, enable_confidence_head=False)
    dspark.load_state_dict(dflash.state_dict())
    alike = {"ce_loss_alpha": 0.3, "l1_loss_alpha": 0.7}
    ours, theirs = (drafter.training_forward(batch, anchor_seeds=SEEDS, **alike) for drafter in (dflash, dspark))
    assert ours.loss == theirs.loss
    assert ours.metrics == theirs.metrics


@pytest.mark.parametrize(("sample_from_anchor", "num_slots"), [(True, 4), (False, 3)])
def test_slots_predict_the_tokens_after_the_anchor(make_drafter, make_batch, sample_from_anchor, num_slots):
    """Anchor 8: slot 0 predicts token 9 if it predicts at all; without it slot 1 does, and there is one slot less."""
    drafter, batch = make_drafter(algorithm="dflash", sample_from_anchor=sample_from_anchor), make_batch(20)
    out = drafter.training_forward(batch, anchors=anchors_at(8, 17), return_logits=True)
    assert out.draft_logits.shape == (1, 2, num_slots, 23)
    assert torch.equal(out.target_ids[0, 0], batch.input_ids[0, 9 : 9 + num_slots])
    assert out.eval_mask[0].tolist() == [[True] * num_slots, [True, True] + [False] * (num_slots - 2)]
    expected = drafter.head_logits(batch.target_last_hidden_states[0, 8 : 8 + num_slots])
    torch.testing.assert_close(out.aligned_target_logits[0, 0], expected)
    assert [name for name in out.metrics if name.startswith("accept")] == [f"accept_rate@{k}" for k in range(num_slots)]


def test_masks_alone_predict_with_the_same_inputs_one_slot_later(make_drafter, make_batch):
    """The blocks are the same; only which slot answers for which token differs."""
    batch = make_batch(20)
    anchored, masked = (make_drafter(algorithm="dflash", sample_from_anchor=value) for value in (True, False))
    masked.load_state_dict(anchored.state_dict())
    ours, theirs = (
        drafter.training_forward(batch, anchors=anchors_at(8), return_logits=True).draft_logits[0, 0]
        for drafter in (masked, anchored)
    )
    torch.testing.assert_close(ours, theirs[1:])


@pytest.mark.parametrize("algorithm", ["dflash", "dspark"])
@pytest.mark.parametrize("sample_from_anchor", [True, False])
def test_proposal_is_the_argmax_of_the_training_logits(make_drafter, make_batch, algorithm, sample_from_anchor):
    drafter = make_drafter(algorithm=algorithm, sample_from_anchor=sample_from_anchor).eval()
    batch, anchor = make_batch(20), 9
    proposal = observed(drafter, batch, anchor).propose(int(batch.input_ids[0, anchor])).token_ids
    assert len(proposal) == drafter.settings.num_drafts == (4 if sample_from_anchor else 3)
    batch.input_ids[0, anchor + 1 : anchor + 1 + len(proposal)] = proposal
    logits = drafter.training_forward(batch, anchors=anchors_at(anchor), return_logits=True).draft_logits[0, 0]
    assert torch.equal(proposal, logits.argmax(-1))


def test_proposal_does_not_depend_on_how_its_context_was_observed(make_drafter, make_batch):
    drafter, batch = make_drafter(algorithm="dflash").eval(), make_batch(40)
    whole = observed(drafter, batch, 30)
    pieces = OneSequence(drafter)
    for start, end in ((0, 11), (11, 12), (12, 30)):
        pieces.observe(batch.target_hidden_states[0, start:end], batch.input_ids[0, start + 1 : end + 1])
    ours, theirs = (sequence.propose(3, temperature=1.0, seed=1) for sequence in (pieces, whole))
    assert torch.equal(ours.token_ids, theirs.token_ids)
    torch.testing.assert_close(ours.probabilities, theirs.probabilities, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("sample_from_anchor", [True, False])
def test_batch_without_supervision_has_zero_loss_and_gradients_and_is_counted(
    make_drafter, make_batch, sample_from_anchor
):
    drafter = make_drafter(algorithm="dflash", sample_from_anchor=sample_from_anchor)
    batch = make_batch(9, 6, prompt=9)
    calls = []
    out = drafter.training_forward(batch, anchor_seeds=SEEDS, reduce=lambda values: calls.append(values) or values)
    out.loss.backward()
    assert out.loss.item() == 0
    gradients = [weight.grad for weight in drafter.parameters() if weight.requires_grad]
    assert all(gradient is not None and gradient.abs().max() == 0 for gradient in gradients)
    assert out.metrics["block_supervised_tokens_abs"] == out.metrics["valid_anchors_abs"] == 0
    assert len(calls) == 2  # other ranks would wait for ever otherwise
