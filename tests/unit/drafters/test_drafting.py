"""Drafting with a cache against the same forward pass without one: what training computes."""

import pytest
import torch
from one_sequence import OneSequence

from drafters.anchors import Anchors

KINDS = ["vanilla", "gated", "rnn"]


def observed(drafter, batch, num_rows, pieces=(1,)):
    """A sequence with the first rows of a one-row batch observed, in pieces of the given sizes by turns."""
    sequence, start, turn = OneSequence(drafter), 0, 0
    while start < num_rows:
        end = min(num_rows, start + pieces[turn % len(pieces)])
        sequence.observe(batch.target_hidden_states[0, start:end], batch.input_ids[0, start + 1 : end + 1])
        start, turn = end, turn + 1
    return sequence


def training_logits(drafter, batch, anchor, drafts):
    """Logits that the drafter trains on when the tokens after the anchor are the drafts: [γ, V]."""
    batch.input_ids[0, anchor + 1 : anchor + 1 + len(drafts)] = drafts
    anchors = Anchors(torch.tensor([[anchor]]), torch.tensor([[True]]))
    out = drafter.training_forward(batch, anchors=anchors, return_logits=True)
    return out.draft_logits[0, 0], out.confidence_pred[0, 0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pieces", [(100,), (1,), (3, 1, 4)])
def test_greedy_proposal_is_the_argmax_of_the_training_logits(make_drafter, make_batch, kind, pieces):
    drafter, batch = make_drafter(markov_head_type=kind).eval(), make_batch(20)
    anchor = 9
    sequence = observed(drafter, batch, anchor, pieces)
    assert sequence.num_context == anchor
    proposal = sequence.propose(int(batch.input_ids[0, anchor]))
    assert proposal.probabilities is None
    assert len(set(proposal.token_ids.tolist())) > 1
    logits, _ = training_logits(drafter, batch, anchor, proposal.token_ids)
    assert torch.equal(proposal.token_ids, logits.argmax(-1))


@pytest.mark.parametrize("kind", KINDS)
def test_sampled_proposal_comes_with_the_distributions_of_the_training_logits(make_drafter, make_batch, kind):
    drafter, batch = make_drafter(markov_head_type=kind).eval(), make_batch(20)
    anchor = 9
    sequence = observed(drafter, batch, anchor, (100,))
    proposal = sequence.propose(int(batch.input_ids[0, anchor]), temperature=0.7, seed=4)
    logits, _ = training_logits(drafter, batch, anchor, proposal.token_ids)
    assert proposal.probabilities.dtype == torch.float32
    torch.testing.assert_close(proposal.probabilities, torch.softmax(logits / 0.7, -1), rtol=1e-4, atol=1e-6)


def test_sampling_follows_the_given_numbers(make_drafter, make_batch):
    drafter, batch = make_drafter().eval(), make_batch(20)
    sequence = observed(drafter, batch, 9, (100,))

    def draw(seed):
        return sequence.propose(3, temperature=2.0, seed=seed).token_ids

    assert torch.equal(draw(1), draw(1))
    assert len({tuple(draw(seed).tolist()) for seed in range(10)}) > 1


def test_proposing_leaves_what_was_observed_as_it_was(make_drafter, make_batch):
    drafter, batch = make_drafter().eval(), make_batch(20)
    sequence = observed(drafter, batch, 9, (100,))
    first = sequence.propose(3)
    sequence.propose(5)
    assert torch.equal(sequence.propose(3).token_ids, first.token_ids)


def test_temperature_below_a_hundred_thousandth_is_greedy(make_drafter, make_batch):
    drafter, batch = make_drafter().eval(), make_batch(20)
    sequence = observed(drafter, batch, 9, (100,))
    nearly = sequence.propose(3, temperature=1e-6)
    assert nearly.probabilities is None
    assert torch.equal(nearly.token_ids, sequence.propose(3).token_ids)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_confidence_is_that_of_the_training_forward(make_drafter, make_batch, temperature):
    drafter, batch = make_drafter().eval(), make_batch(20)
    anchor = 9
    sequence = observed(drafter, batch, anchor, (100,))
    proposal = sequence.propose(int(batch.input_ids[0, anchor]), temperature=temperature)
    _, confidence = training_logits(drafter, batch, anchor, proposal.token_ids)
    torch.testing.assert_close(proposal.confidence, confidence, rtol=1e-4, atol=1e-5)
    without = observed(make_drafter(enable_confidence_head=False).eval(), batch, anchor, (100,))
    assert without.propose(3).confidence is None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_sequences_of_a_batch_draft_as_if_alone(make_drafter, make_batch, kind, temperature):
    """Three of different lengths; the first ends and the last takes its place, then a new one joins."""
    drafter, batch = make_drafter(markov_head_type=kind).eval(), make_batch(20)
    features, tokens = batch.target_hidden_states[0], batch.input_ids[0]
    state = drafter.start_drafting(max_sequences=3)
    state.open([0, 0, 0])
    drafter.observe(state, features[:9].expand(3, -1, -1), tokens[1:10].expand(3, -1), [9, 2, 5])
    state.drop(0)  # now the one of 5, then the one of 2
    drafter.observe(state, features[9:12].expand(2, -1, -1), tokens[10:13].expand(2, -1), [3, 1])
    state.open([0])
    drafter.observe(state, features[None, :7], tokens[None, 1:8], [7], first=2)
    uniforms = torch.rand(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    together = drafter.propose(state, torch.tensor([1, 2, 3]), temperature=temperature, uniforms=uniforms)
    for place, rows in enumerate([[*range(5), 9, 10, 11], [0, 1, 9], list(range(7))]):
        alone = drafter.start_drafting()
        alone.open([0])
        drafter.observe(alone, features[rows][None], tokens[rows][None], [len(rows)])
        own = drafter.propose(
            alone, torch.tensor([place + 1]), temperature=temperature, uniforms=uniforms[place : place + 1]
        )
        assert torch.equal(together.token_ids[place], own.token_ids[0])
        torch.testing.assert_close(together.confidence[place], own.confidence[0], rtol=1e-4, atol=1e-5)


def test_cache_grows_past_its_first_room(make_drafter, make_batch):
    drafter, batch = make_drafter().eval(), make_batch(120)
    small, large = observed(drafter, batch, 110, (7,)), observed(drafter, batch, 110, (110,))
    for layer in range(2):
        ours, theirs = small.keys_values(layer), large.keys_values(layer)
        torch.testing.assert_close(ours.keys, theirs.keys, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours.values, theirs.values, rtol=1e-4, atol=1e-5)


def test_permuted_context_drafts_from_other_positions_but_repeatably(make_drafter, make_batch):
    batch = make_batch(20)
    straight, permuted = make_drafter().eval(), make_drafter(permute_context=True).eval()
    keys = [observed(drafter, batch, 9, (3,)).keys_values().keys for drafter in (straight, permuted, permuted)]
    assert not torch.allclose(keys[0], keys[1])
    assert torch.equal(keys[1], keys[2])


def test_proposal_without_context_is_refused(make_drafter):
    with pytest.raises(ValueError, match="nothing observed"):
        OneSequence(make_drafter()).propose(1)


def test_features_of_another_width_are_refused(make_drafter):
    with pytest.raises(ValueError, match=r"features must be \[b, R, 48\], got \[1, 2, 16\]"):
        OneSequence(make_drafter()).observe(torch.zeros(2, 16), torch.zeros(2))
