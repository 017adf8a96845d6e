import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from one_sequence import OneSequence
from safetensors.torch import load_file, save_file

from drafters import FeatureBatch, load_drafter, save_drafter
from drafters.checkpoint import CheckpointFormatError
from drafters.vocabulary import check_offsets, most_frequent, share_of

HIDDEN, VOCAB = 16, 23
KEPT = (0, 3, 4, 7, 11, 12, 19, 22)


def cut_drafter(make_drafter, **settings):
    layers = {"target_layer_ids": (0, 1, 2, 3, 4), "num_draft_layers": 1}
    drafter = make_drafter(
        **({"algorithm": "eagle3", "draft_vocab_size": len(KEPT), "ttt_length": 4} | layers | settings)
    )
    drafter.set_vocabulary(KEPT)
    return drafter


def batch_of(length=20, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return FeatureBatch.from_tensors(
        torch.randint(VOCAB, (1, length), generator=generator),
        (torch.arange(length) >= 5).long()[None],
        torch.ones(1, length, dtype=torch.long),
        torch.randn(1, length, 5 * HIDDEN, generator=generator),
        torch.randn(1, length, HIDDEN, generator=generator),
    )


def observed(drafter, num_rows=6):
    sequence = OneSequence(drafter)
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(num_rows, 5 * HIDDEN, generator=generator)
    sequence.observe(features, torch.arange(1, num_rows + 1))
    return sequence


def test_most_frequent_tokens_are_kept_with_ties_to_the_lower_id():
    assert most_frequent({5: 3, 1: 9, 2: 3, 7: 1}, 3, vocab_size=8) == (1, 2, 5)


def test_tokens_that_are_always_kept_need_no_count():
    assert most_frequent({5: 3, 1: 9}, 2, vocab_size=8, always=[6]) == (1, 6)


@given(
    st.dictionaries(st.integers(0, 40), st.integers(1, 9)), st.integers(2, 41), st.sets(st.integers(0, 40), max_size=2)
)
def test_kept_tokens_are_as_many_as_asked_for_and_none_left_out_is_more_frequent(counts, size, always):
    kept = most_frequent(counts, size, vocab_size=41, always=always)
    assert list(kept) == sorted(set(kept))
    assert len(kept) == size
    assert always <= set(kept)
    left_out = max((count for token, count in counts.items() if token not in kept), default=0)
    assert all(counts.get(token, 0) >= left_out for token in kept if token not in always)


@pytest.mark.parametrize(("size", "always"), [(9, []), (1, [2, 3])])
def test_sizes_that_cannot_be_are_refused(size, always):
    with pytest.raises(ValueError, match="draft_vocab_size"):
        most_frequent({}, size, vocab_size=8, always=always)


def test_share_is_that_of_what_was_counted():
    assert share_of({1: 6, 2: 3, 5: 1}, [1, 5]) == pytest.approx(0.7)
    assert share_of({}, [1]) == 0


@pytest.mark.parametrize("offsets", [[0, 0, -1], [3, 3, 99], [-1, 0, 0]])
def test_offsets_that_are_no_vocabulary_are_refused(offsets):
    with pytest.raises(ValueError, match="d2t must be offsets"):
        check_offsets(torch.tensor(offsets), vocab_size=8)


@pytest.mark.parametrize("tokens", [(0, 1), (*KEPT[:-1], VOCAB), (3, 0, *KEPT[2:])])
def test_vocabularies_of_another_size_order_or_model_are_refused(make_drafter, tokens):
    with pytest.raises(ValueError, match="draft vocabulary"):
        cut_drafter(make_drafter).set_vocabulary(tokens)


def test_uncut_drafter_takes_no_vocabulary(make_drafter):
    with pytest.raises(ValueError, match="draft_vocab_size"):
        cut_drafter(make_drafter, draft_vocab_size=VOCAB).set_vocabulary(KEPT)


def test_larger_vocabulary_than_the_targets_is_refused(make_drafter):
    with pytest.raises(ValueError, match=r"draft_vocab_size 24 is above the target's vocabulary of 23"):
        cut_drafter(make_drafter, draft_vocab_size=24)


def test_block_drafters_have_no_cut(make_drafter):
    with pytest.raises(ValueError, match="draft_vocab_size: no setting of dspark"):
        make_drafter(draft_vocab_size=4)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_only_kept_tokens_are_drafted_by_the_targets_own_ids(make_drafter, temperature):
    drafter = cut_drafter(make_drafter).eval()
    proposal = observed(drafter).propose(6, temperature=temperature)
    assert set(proposal.token_ids.tolist()) <= set(KEPT)
    if temperature:
        outside = [token for token in range(VOCAB) if token not in KEPT]
        assert (proposal.probabilities[:, outside] == 0).all()
        torch.testing.assert_close(proposal.probabilities.sum(-1), torch.ones(len(proposal.token_ids)))


def test_drafts_are_the_uncut_drafters_best_among_the_kept(make_drafter):
    cut, whole = cut_drafter(make_drafter).eval(), cut_drafter_whole(make_drafter)
    hidden = torch.randn(3, HIDDEN)
    logits = whole.head_logits(hidden)
    torch.testing.assert_close(cut.head_logits(hidden)[:, KEPT], logits[:, KEPT])
    expected = [KEPT[place] for place in logits[:, KEPT].argmax(-1).tolist()]
    assert cut.head_logits(hidden).argmax(-1).tolist() == expected


def cut_drafter_whole(make_drafter):
    layers = {"target_layer_ids": (0, 1, 2, 3, 4), "num_draft_layers": 1}
    return make_drafter(algorithm="eagle3", ttt_length=4, **layers).eval()


def test_drafting_sees_a_head_that_was_replaced(make_drafter):
    drafter = cut_drafter(make_drafter).eval()
    hidden = torch.randn(2, HIDDEN)
    before = drafter.head_logits(hidden)
    with torch.no_grad():
        drafter.lm_head.weight.neg_()
    torch.testing.assert_close(drafter.head_logits(hidden)[:, KEPT], -before[:, KEPT])


def test_loss_after_decoding_has_gradients(make_drafter):
    drafter = cut_drafter(make_drafter).eval()
    with torch.inference_mode():
        observed(drafter).propose(6)
    drafter.training_forward(batch_of(), return_logits=True).loss.backward()
    assert drafter.fc.weight.grad.abs().sum() > 0


def test_plain_and_fused_training_agree(make_drafter):
    losses = []
    for loss in ("fused", "plain"):
        drafter = cut_drafter(make_drafter, loss=loss)
        out = drafter.training_forward(batch_of())
        out.loss.backward()
        losses.append((out.loss.detach(), out.metrics, drafter.fc.weight.grad))
    (fused, fused_metrics, fused_grad), (plain, plain_metrics, plain_grad) = losses
    torch.testing.assert_close(fused, plain)
    assert fused_metrics == pytest.approx(plain_metrics, abs=1e-5)
    torch.testing.assert_close(fused_grad, plain_grad, rtol=1e-4, atol=1e-6)


def test_cut_drafter_saves_and_loads(make_drafter, tmp_path):
    drafter = cut_drafter(make_drafter).bfloat16()
    save_drafter(drafter, tmp_path)
    loaded = load_drafter(tmp_path)
    assert loaded.drafted_tokens.tolist() == list(KEPT)
    assert loaded.d2t.dtype == torch.int64
    assert loaded.settings.draft_vocab_size == len(KEPT)
    assert loaded.lm_head.weight.shape == (VOCAB, HIDDEN)


def test_spoiled_offsets_of_a_checkpoint_are_refused(make_drafter, tmp_path):
    save_drafter(cut_drafter(make_drafter), tmp_path)
    tensors = {name: tensor.clone() for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    tensors["d2t"] = torch.tensor(KEPT)  # ids instead of offsets: the trap of this tensor
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointFormatError, match=r"model\.safetensors: d2t must be offsets"):
        load_drafter(tmp_path)
