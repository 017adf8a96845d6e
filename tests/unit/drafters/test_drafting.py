"""Drafting with a cache against the same forward pass without one: what training computes."""

import pytest
import torch

from drafters.anchors import Anchors

KINDS = ["vanilla", "gated", "rnn"]


def observed(drafter, batch, num_rows, pieces=(1,)):
    """A state that has observed the first rows of a one-row batch, in pieces of the given sizes by turns."""
    state, start, turn = drafter.start_drafting(), 0, 0
    while start < num_rows:
        end = min(num_rows, start + pieces[turn % len(pieces)])
        drafter.observe(state, batch.target_hidden_states[0, start:end], batch.input_ids[0, start + 1 : end + 1])
        start, turn = end, turn + 1
    return state


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
    state = observed(drafter, batch, anchor, pieces)
    assert state.num_context == anchor
    proposal = drafter.propose(state, int(batch.input_ids[0, anchor]))
    assert proposal.probabilities is None
    assert len(set(proposal.token_ids.tolist())) > 1
    logits, _ = training_logits(drafter, batch, anchor, proposal.token_ids)
    assert torch.equal(proposal.token_ids, logits.argmax(-1))


@pytest.mark.parametrize("kind", KINDS)
def test_sampled_proposal_comes_with_the_distributions_of_the_training_logits(make_drafter, make_batch, kind):
    drafter, batch = make_drafter(markov_head_type=kind).eval(), make_batch(20)
    anchor = 9
    state = observed(drafter, batch, anchor, (100,))
    generator = torch.Generator().manual_seed(4)
    proposal = drafter.propose(state, int(batch.input_ids[0, anchor]), temperature=0.7, generator=generator)
    logits, _ = training_logits(drafter, batch, anchor, proposal.token_ids)
    assert proposal.probabilities.dtype == torch.float32
    torch.testing.assert_close(proposal.probabilities, torch.softmax(logits / 0.7, -1), rtol=1e-4, atol=1e-6)


def test_sampling_follows_the_given_generator(make_drafter, make_batch):
    drafter, batch = make_drafter().eval(), make_batch(20)
    state = observed(drafter, batch, 9, (100,))

    def draw(seed):
        return drafter.propose(state, 3, temperature=2.0, generator=torch.Generator().manual_seed(seed)).token_ids

    assert torch.equal(draw(1), draw(1))
    assert len({tuple(draw(seed).tolist()) for seed in range(10)}) > 1


def test_proposing_leaves_the_state_as_it_was(make_drafter, make_batch):
    drafter, batch = make_drafter().eval(), make_batch(20)
    state = observed(drafter, batch, 9, (100,))
    first = drafter.propose(state, 3)
    drafter.propose(state, 5)
    assert torch.equal(drafter.propose(state, 3).token_ids, first.token_ids)


def test_temperature_below_a_hundred_thousandth_is_greedy(make_drafter, make_batch):
    drafter, batch = make_drafter().eval(), make_batch(20)
    state = observed(drafter, batch, 9, (100,))
    nearly = drafter.propose(state, 3, temperature=1e-6)
    assert nearly.probabilities is None
    assert torch.equal(nearly.token_ids, drafter.propose(state, 3).token_ids)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_proposal_is_cut_before_the_first_slot_below_the_threshold(make_drafter, make_batch, temperature):
    drafter, batch = make_drafter().eval(), make_batch(20)
    anchor = 9
    state = observed(drafter, batch, anchor, (100,))

    def propose(threshold):
        generator = torch.Generator().manual_seed(2)
        return drafter.propose(
            state,
            int(batch.input_ids[0, anchor]),
            temperature=temperature,
            generator=generator,
            confidence_threshold=threshold,
        )

    whole = propose(0.0)
    _, confidence = training_logits(drafter, batch, anchor, whole.token_ids)
    probabilities = confidence.sigmoid().tolist()
    assert propose(max(probabilities) + 1e-3).token_ids.tolist() == []
    for threshold in probabilities:
        # a little above one slot's own probability cuts there, or earlier
        expected = next(slot for slot, p in enumerate(probabilities) if p < threshold + 1e-4)
        cut = propose(threshold + 1e-4)
        assert torch.equal(cut.token_ids, whole.token_ids[:expected])
        if temperature:
            assert torch.equal(cut.probabilities, whole.probabilities[:expected])


def test_threshold_is_ignored_without_a_confidence_head(make_drafter, make_batch):
    drafter, batch = make_drafter(enable_confidence_head=False).eval(), make_batch(20)
    state = observed(drafter, batch, 9, (100,))
    assert len(drafter.propose(state, 3, confidence_threshold=1.0).token_ids) == 4


def test_cache_grows_past_its_first_room(make_drafter, make_batch):
    drafter, batch = make_drafter().eval(), make_batch(120)
    small, large = observed(drafter, batch, 110, (7,)), observed(drafter, batch, 110, (110,))
    for ours, theirs in zip(small.caches, large.caches, strict=True):
        torch.testing.assert_close(ours.rows().keys, theirs.rows().keys, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours.rows().values, theirs.rows().values, rtol=1e-4, atol=1e-5)


def test_permuted_context_drafts_from_other_positions_but_repeatably(make_drafter, make_batch):
    batch = make_batch(20)
    straight, permuted = make_drafter().eval(), make_drafter(permute_context=True).eval()
    keys = [observed(drafter, batch, 9, (3,)).caches[0].rows().keys for drafter in (straight, permuted, permuted)]
    assert not torch.allclose(keys[0], keys[1])
    assert torch.equal(keys[1], keys[2])


def test_proposal_without_context_is_refused(make_drafter):
    drafter = make_drafter()
    with pytest.raises(ValueError, match="nothing observed"):
        drafter.propose(drafter.start_drafting(), 1)


def test_features_of_another_width_are_refused(make_drafter):
    drafter = make_drafter()
    with pytest.raises(ValueError, match=r"features must be \[R, 48\], got \[2, 16\]"):
        drafter.observe(drafter.start_drafting(), torch.zeros(2, 16), torch.zeros(2))
