"""Eagle3's drafting with a cache; `test_eagle3` holds it against what training computes."""

import pytest
import torch
from one_sequence import OneSequence
from transformers import Qwen3Config

from drafters import build_drafter

HIDDEN, VOCAB, NUM_STEPS = 16, 23, 5
CONTEXT = 9


@pytest.fixture
def drafter():
    torch.manual_seed(3)
    target = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=24,
        num_hidden_layers=7,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.3,
    )
    return build_drafter(target, algorithm="eagle3", target_layer_ids=range(5), ttt_length=NUM_STEPS).eval()


@pytest.fixture
def rows():
    generator = torch.Generator().manual_seed(4)
    return (
        torch.randn(CONTEXT, 5 * HIDDEN, generator=generator),
        torch.randint(VOCAB, (CONTEXT,), generator=generator),
    )


def observed(drafter, rows, pieces=(CONTEXT,), stop_token_ids=()):
    sequence, start = OneSequence(drafter, stop_token_ids), 0
    for count in pieces:
        sequence.observe(rows[0][start : start + count], rows[1][start : start + count])
        start += count
    return sequence


@pytest.mark.parametrize("pieces", [(1,) * CONTEXT, (4, 1, 4)])
def test_rows_may_come_in_pieces(drafter, rows, pieces):
    whole, pieced = observed(drafter, rows), observed(drafter, rows, pieces)
    assert pieced.num_context == CONTEXT
    torch.testing.assert_close(pieced.state.next_hidden, whole.state.next_hidden)
    torch.testing.assert_close(pieced.keys_values().keys, whole.keys_values().keys)


def test_proposing_leaves_what_was_observed_as_it_was(drafter, rows):
    sequence = observed(drafter, rows)
    hidden, keys = sequence.state.next_hidden.clone(), sequence.keys_values().keys.clone()
    first = sequence.propose(int(rows[1][-1]))
    assert len(first.token_ids) == NUM_STEPS
    assert first.probabilities is None
    assert torch.equal(sequence.state.next_hidden, hidden)
    assert torch.equal(sequence.keys_values().keys, keys)
    assert torch.equal(sequence.propose(int(rows[1][-1])).token_ids, first.token_ids)


def test_rounds_go_on_from_verified_rows_alone(drafter, rows):
    """A round's drafts leave nothing behind: observing further rows gives what observing all at once gives."""
    features, tokens = rows
    sequence = observed(drafter, (features[:6], tokens[:6]), (6,))
    sequence.propose(int(tokens[5]))
    sequence.observe(features[6:], tokens[6:])
    torch.testing.assert_close(sequence.state.next_hidden, observed(drafter, rows).state.next_hidden)


def test_proposal_ends_with_the_first_drafted_stop_token(drafter, rows):
    whole = observed(drafter, rows).propose(0).token_ids.tolist()
    stop = whole[2]
    expected = whole[: whole.index(stop) + 1]
    cut = observed(drafter, rows, stop_token_ids=(stop, VOCAB)).propose(0)
    assert cut.token_ids.tolist() == expected
    assert len(expected) < NUM_STEPS


def test_sampled_proposal_comes_with_its_distributions(drafter, rows):
    sequence = observed(drafter, rows)
    proposal = sequence.propose(0, temperature=0.7, seed=1)
    assert proposal.probabilities.shape == (NUM_STEPS, VOCAB)
    assert proposal.probabilities.dtype == torch.float32
    logits = drafter.head_logits(drafter.norm(sequence.state.next_hidden))[0]
    torch.testing.assert_close(proposal.probabilities[0], torch.softmax(logits / 0.7, -1))
    again = sequence.propose(0, temperature=0.7, seed=1)
    assert torch.equal(proposal.token_ids, again.token_ids)
    others = [sequence.propose(0, temperature=0.7, seed=seed).token_ids.tolist() for seed in range(8)]
    assert len({tuple(tokens) for tokens in others}) > 1


def test_sequences_of_a_batch_draft_as_if_alone(drafter, rows):
    """Three of different lengths; the first ends, and the last takes its place."""
    features, tokens = rows
    counts = [CONTEXT, 2, 5]
    state = drafter.start_drafting(max_sequences=3)
    state.open([0, 0, 0])
    drafter.observe(state, features.expand(3, -1, -1), tokens.expand(3, -1), counts)
    state.drop(0)
    drafter.observe(state, features[5:7].expand(2, -1, -1), tokens[5:7].expand(2, -1), [2, 1])
    together = drafter.propose(state, torch.tensor([1, 1])).token_ids
    for place, pieces in enumerate([(features[:7], tokens[:7]), (features[[0, 1, 5]], tokens[[0, 1, 5]])]):
        alone = observed(drafter, pieces, (len(pieces[1]),))
        assert torch.equal(together[place], alone.propose(1).token_ids)
        torch.testing.assert_close(state.next_hidden[place], alone.state.next_hidden[0])


def test_proposal_without_context_is_refused(drafter):
    with pytest.raises(ValueError, match="nothing observed"):
        OneSequence(drafter).propose(1)


def test_rows_of_another_shape_are_refused(drafter, rows):
    sequence = OneSequence(drafter)
    with pytest.raises(
        ValueError, match=r"features must be \[b, R, 80\] with \[b, R\] next tokens, got \[1, 2, 16\] with \[1, 2\]"
    ):
        sequence.observe(torch.zeros(2, 16), torch.zeros(2))
    with pytest.raises(ValueError, match=r"got \[1, 9, 80\] with \[1, 3\]"):
        sequence.observe(rows[0], rows[1][:3])
    with pytest.raises(ValueError, match="nothing to observe"):
        sequence.observe(rows[0][:0], rows[1][:0])
