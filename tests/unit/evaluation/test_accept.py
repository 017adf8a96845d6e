import math

import pytest
import torch

from drafters.drafter import Proposal
from drafters.sampling import draw_tokens
from evaluation.accept import Verdicts, distribution, is_greedy, verify_greedy, verify_sampled

NUM_TRIALS = 6000
DRAFT = torch.tensor([0.10, 0.20, 0.30, 0.40])
TARGET = torch.tensor([[0.40, 0.30, 0.20, 0.10], [0.05, 0.05, 0.60, 0.30], [0.25, 0.25, 0.10, 0.40]])
CHI_SQUARE_3_AT_1E_4 = 21.1
"""Upper 1e-4 quantile of chi-square with 3 degrees of freedom."""


def decided(verdicts):
    return list(zip(verdicts.num_accepted.tolist(), verdicts.next_tokens.tolist(), strict=True))


def uniforms_of(num_rows, num_drafts, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(num_rows, num_drafts + 1, dtype=torch.float64, generator=generator)


def judged(drafts, p_draft, p_target, num_rows=50):
    """The same proposal judged with many random numbers; the set of what was decided."""
    proposal = Proposal(
        torch.tensor(drafts, dtype=torch.long).expand(num_rows, -1), None, p_draft.expand(num_rows, -1, -1)
    )
    verdicts = verify_sampled(proposal, p_target.expand(num_rows, -1, -1), uniforms_of(num_rows, len(drafts)))
    return set(decided(verdicts))


def test_greedy_keeps_drafts_up_to_first_difference():
    drafts = torch.tensor([[5, 6, 7]] * 4)
    choices = torch.tensor([[5, 6, 7, 8], [5, 9, 7, 8], [1, 6, 7, 8], [5, 6, 9, 8]])
    assert decided(verify_greedy(Proposal(drafts), choices)) == [(3, 8), (1, 9), (0, 1), (2, 9)]


def test_greedy_keeps_nothing_past_a_proposals_length():
    drafts = torch.tensor([[5, 6, 7]] * 3)
    choices = torch.tensor([[5, 6, 7, 8]] * 3)
    verdicts = verify_greedy(Proposal(drafts, lengths=torch.tensor([3, 1, 0])), choices)
    assert decided(verdicts) == [(3, 8), (1, 6), (0, 5)]


def test_greedy_without_drafts_is_the_targets_choice():
    assert decided(verify_greedy(Proposal(torch.empty(2, 0, dtype=torch.long)), torch.tensor([[4], [9]]))) == [
        (0, 4),
        (0, 9),
    ]


def test_temperature_divides_logits_in_float32():
    logits = torch.tensor([0.0, math.log(3.0)], dtype=torch.bfloat16)
    rounded = math.exp(float(logits[1]) / 0.5)  # bfloat16 holds log 3 as 1.1015625
    probabilities = distribution(logits, 0.5)
    assert probabilities.dtype == torch.float32
    torch.testing.assert_close(probabilities, torch.tensor([1 / (1 + rounded), rounded / (1 + rounded)]))


def test_greedy_begins_below_the_smallest_temperature():
    assert is_greedy(0.0)
    assert is_greedy(0.9e-5)
    assert not is_greedy(1e-5)


def test_draft_surely_accepted_when_target_is_at_least_as_likely():
    p_draft = torch.tensor([[0.5, 0.5, 0.0]])
    p_target = torch.tensor([[0.6, 0.4, 0.0], [0.0, 0.0, 1.0]])
    assert judged([0], p_draft, p_target) == {(1, 2)}  # bonus comes from the target's next row


def test_draft_surely_rejected_when_target_excludes_it():
    # residual max(0, [0, .25, .75] − [.5, .5, 0]) = [0, 0, .75]: the correction is token 2
    p_draft = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]])
    p_target = torch.tensor([[0.0, 0.25, 0.75], [1.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    assert judged([0, 0], p_draft, p_target) == {(0, 2)}  # the second would be accepted, but comes after a rejection


def test_impossible_draft_is_ratio_against_smallest_probability():
    # p_draft(x) = 0 is clamped to 1e-8: 0.5 / 1e-8 > 1, accepted
    assert judged([1], torch.tensor([[1.0, 0.0]]), torch.tensor([[0.5, 0.5], [1.0, 0.0]])) == {(1, 0)}


def test_empty_residual_falls_back_to_target():
    # The draft (token 1) has probability 0 in both, so it is rejected; both rows are equal, so nothing is left over.
    row = torch.tensor([[1.0, 0.0]])
    assert judged([1], row, row.repeat(2, 1)) == {(0, 0)}


def test_no_draft_samples_target_row():
    assert judged([], torch.empty(0, 3), torch.tensor([[0.0, 1.0, 0.0]])) == {(0, 1)}


def test_cut_proposal_draws_its_next_token_from_the_target_not_from_a_residual():
    # Cut after one accepted draft: the second, which was never proposed, must not shape what follows.
    p_draft, p_target = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    proposal = Proposal(torch.zeros(1, 2, dtype=torch.long), torch.tensor([1]), p_draft[None])
    assert decided(verify_sampled(proposal, p_target[None], uniforms_of(1, 2))) == [(1, 0)]


def without_residual(proposal, p_target, uniforms):
    """A wrong verifier: the correction is drawn from the target instead of the residual."""
    num_accepted, _ = verify_sampled(proposal, p_target, uniforms)
    rows = p_target[torch.arange(len(num_accepted)), num_accepted]
    return Verdicts(num_accepted, draw_tokens(rows, uniforms[:, -1]))


def accepting_likelier(proposal, p_target, uniforms):
    """A wrong verifier: keeps a draft exactly if the target finds it likelier than the drafter does."""
    of_target, of_draft = (
        rows.gather(2, proposal.token_ids[..., None])[..., 0] for rows in (p_target[:, :-1], proposal.probabilities)
    )
    num_accepted = (of_target >= of_draft).long().cumprod(1).sum(1)
    sequences = torch.arange(len(num_accepted))
    p_draft = torch.cat([proposal.probabilities, torch.zeros_like(p_target[:, :1])], dim=1)
    residual = (p_target[sequences, num_accepted] - p_draft[sequences, num_accepted]).clamp_min(0)
    return Verdicts(num_accepted, draw_tokens(residual, uniforms[:, -1]))


def chi_square_by_position(verify):
    """Distance of the 1st and 2nd committed token from the target's rows 0 and 1 (3 degrees of freedom each)."""
    generator = torch.Generator().manual_seed(20)
    drafts = torch.multinomial(DRAFT, 2 * NUM_TRIALS, replacement=True, generator=generator).view(NUM_TRIALS, 2)
    proposal = Proposal(drafts, None, DRAFT.expand(NUM_TRIALS, 2, -1))
    verdicts = verify(proposal, TARGET.expand(NUM_TRIALS, -1, -1), uniforms_of(NUM_TRIALS, 2, seed=21))
    counts = torch.zeros(2, 4)
    for pair, (num_accepted, next_token) in zip(drafts.tolist(), decided(verdicts), strict=True):
        for position, token in enumerate([*pair[:num_accepted], next_token][:2]):
            counts[position, token] += 1
    expected = TARGET[:2] * counts.sum(dim=1, keepdim=True)
    return ((counts - expected) ** 2 / expected).sum(dim=1).tolist()


def test_committed_tokens_are_distributed_as_the_target():
    first, second = chi_square_by_position(verify_sampled)
    assert first < CHI_SQUARE_3_AT_1E_4
    assert second < CHI_SQUARE_3_AT_1E_4


@pytest.mark.parametrize("biased", [without_residual, accepting_likelier])
def test_biased_verifiers_are_told_apart(biased):
    assert max(chi_square_by_position(biased)) > 10 * CHI_SQUARE_3_AT_1E_4


def test_acceptance_is_the_overlap_of_both_distributions():
    # Σ min(p, q) = .1 + .2 + .2 + .1 = 0.6; standard deviation over 6000 trials is 0.0063
    generator = torch.Generator().manual_seed(3)
    drafts = torch.multinomial(DRAFT, NUM_TRIALS, replacement=True, generator=generator).view(-1, 1)
    proposal = Proposal(drafts, None, DRAFT.expand(NUM_TRIALS, 1, -1))
    verdicts = verify_sampled(proposal, TARGET[:2].expand(NUM_TRIALS, -1, -1), uniforms_of(NUM_TRIALS, 1))
    assert float(verdicts.num_accepted.float().mean()) == pytest.approx(0.6, abs=0.025)
