"""A drafter that drafts only a part of the vocabulary changes nothing of what is decoded."""

import pytest
import torch
from tiny_decoding import tiny_target

from drafters import build_drafter
from drafters.drafter import Proposal
from evaluation import greedy_generate, speculative_generate
from evaluation.accept import verify_sampled

VOCAB = 37
KEPT = tuple(range(0, VOCAB, 2))
PROMPTS = [[3, 1, 4, 1, 5], [9, 2, 6], [5, 3, 5, 8, 9, 7, 9]]


def cut_drafter(target):
    torch.manual_seed(5)
    target.config.initializer_range = 0.3
    drafter = build_drafter(
        target.config,
        algorithm="eagle3",
        layout="llama",
        target_layer_ids=(0, 1, 2),
        ttt_length=3,
        draft_vocab_size=len(KEPT),
    )
    drafter.set_vocabulary(KEPT)
    return drafter.eval()


def test_greedy_output_is_the_targets_own():
    target = tiny_target(vocab_size=VOCAB, num_layers=4)
    out = speculative_generate(target, cut_drafter(target), PROMPTS, max_new_tokens=20)
    expected = [greedy_generate(target, prompt, max_new_tokens=20) for prompt in PROMPTS]
    assert out.output_ids == expected
    decoded = {token for prompt, row in zip(PROMPTS, expected, strict=True) for token in row[len(prompt) :]}
    assert decoded - set(KEPT), "the target says what the drafter cannot"


@pytest.mark.parametrize("seed", [0, 1])
def test_sampled_output_contains_what_the_drafter_cannot_say(seed):
    target = tiny_target(vocab_size=VOCAB, num_layers=4)
    out = speculative_generate(target, cut_drafter(target), PROMPTS, max_new_tokens=30, temperature=2.0, seed=seed)
    decoded = {token for prompt, row in zip(PROMPTS, out.output_ids, strict=True) for token in row[len(prompt) :]}
    assert decoded - set(KEPT)
    assert max(max(lengths) for lengths in out.accepted_lengths) > 1, "and some of its drafts are accepted"


def test_committed_tokens_have_the_targets_distribution_where_the_draft_has_zeros():
    p_target = torch.tensor([[0.1, 0.3, 0.2, 0.4], [0.25] * 4])
    p_draft = torch.tensor([[0.5, 0.0, 0.5, 0.0]])
    generator, num_trials = torch.Generator().manual_seed(7), 20_000
    drafts = torch.multinomial(p_draft[0], num_trials, replacement=True, generator=generator)[:, None]
    uniforms = torch.rand(num_trials, 2, dtype=torch.float64, generator=generator)
    proposal = Proposal(drafts, probabilities=p_draft.expand(num_trials, 1, -1))
    verdicts = verify_sampled(proposal, p_target.expand(num_trials, -1, -1), uniforms)
    committed = torch.where(verdicts.num_accepted > 0, drafts[:, 0], verdicts.next_tokens)
    # Standard error of each share is below 0.0035.
    torch.testing.assert_close(committed.bincount(minlength=4) / num_trials, p_target[0], rtol=0, atol=0.015)
