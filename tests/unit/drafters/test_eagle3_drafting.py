"""Eagle3's drafting with a cache; `test_eagle3` holds it against what training computes."""

import pytest
import torch
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
    state, start = drafter.start_drafting(stop_token_ids=stop_token_ids), 0
    for count in pieces:
        drafter.observe(state, rows[0][start : start + count], rows[1][start : start + count])
        start += count
    return state


@pytest.mark.parametrize("pieces", [(1,) * CONTEXT, (4, 1, 4)])
def test_rows_may_come_in_pieces(drafter, rows, pieces):
    whole, pieced = observed(drafter, rows), observed(drafter, rows, pieces)
    assert pieced.num_context == CONTEXT
    torch.testing.assert_close(pieced.next_hidden, whole.next_hidden)
    torch.testing.assert_close(pieced.caches[0].rows().keys, whole.caches[0].rows().keys)


def test_proposing_leaves_the_state_as_it_was(drafter, rows):
    state = observed(drafter, rows)
    hidden, keys = state.next_hidden.clone(), state.caches[0].rows().keys.clone()
    first = drafter.propose(state, int(rows[1][-1]))
    assert len(first.token_ids) == NUM_STEPS
    assert first.probabilities is None
    assert torch.equal(state.next_hidden, hidden)
    assert torch.equal(state.caches[0].rows().keys, keys)
    assert torch.equal(drafter.propose(state, int(rows[1][-1])).token_ids, first.token_ids)


def test_rounds_go_on_from_verified_rows_alone(drafter, rows):
    """A round's drafts leave nothing behind: observing further rows gives what observing all at once gives."""
    features, tokens = rows
    state = observed(drafter, (features[:6], tokens[:6]), (6,))
    drafter.propose(state, int(tokens[5]))
    drafter.observe(state, features[6:], tokens[6:])
    torch.testing.assert_close(state.next_hidden, observed(drafter, rows).next_hidden)


def test_proposal_ends_with_the_first_drafted_stop_token(drafter, rows):
    whole = drafter.propose(observed(drafter, rows), 0).token_ids.tolist()
    stop = whole[2]
    expected = whole[: whole.index(stop) + 1]
    cut = drafter.propose(observed(drafter, rows, stop_token_ids=(stop, VOCAB)), 0)
    assert cut.token_ids.tolist() == expected
    assert len(expected) < NUM_STEPS


def test_sampled_proposal_comes_with_its_distributions(drafter, rows):
    state, generator = observed(drafter, rows), torch.Generator().manual_seed(1)
    proposal = drafter.propose(state, 0, temperature=0.7, generator=generator)
    assert proposal.probabilities.shape == (NUM_STEPS, VOCAB)
    assert proposal.probabilities.dtype == torch.float32
    logits = drafter.head_logits(drafter.norm(state.next_hidden))[0, 0]
    torch.testing.assert_close(proposal.probabilities[0], torch.softmax(logits / 0.7, -1))
    again = drafter.propose(state, 0, temperature=0.7, generator=torch.Generator().manual_seed(1))
    assert torch.equal(proposal.token_ids, again.token_ids)
    others = [
        drafter.propose(state, 0, temperature=0.7, generator=torch.Generator().manual_seed(seed)).token_ids.tolist()
        for seed in range(8)
    ]
    assert len({tuple(tokens) for tokens in others}) > 1


def test_proposal_without_context_is_refused(drafter):
    with pytest.raises(ValueError, match="nothing observed"):
        drafter.propose(drafter.start_drafting(), 1)


def test_rows_of_another_shape_are_refused(drafter, rows):
    state = drafter.start_drafting()
    with pytest.raises(
        ValueError, match=r"features must be \[R, 80\] with \[R\] next tokens, got \[2, 16\] with \[2\]"
    ):
        drafter.observe(state, torch.zeros(2, 16), torch.zeros(2))
    with pytest.raises(ValueError, match=r"got \[9, 80\] with \[3\]"):
        drafter.observe(state, rows[0], rows[1][:3])
    with pytest.raises(ValueError, match="nothing to observe"):
        drafter.observe(state, rows[0][:0], rows[1][:0])
