import math

import pytest
import torch

from evaluation.accept import Verdict, distribution, is_greedy, verify_greedy, verify_sampled

NUM_TRIALS = 6000
DRAFT = torch.tensor([0.10, 0.20, 0.30, 0.40])
TARGET = torch.tensor([[0.40, 0.30, 0.20, 0.10], [0.05, 0.05, 0.60, 0.30], [0.25, 0.25, 0.10, 0.40]])
CHI_SQUARE_3_AT_1E_4 = 21.1
"""Upper 1e-4 quantile of chi-square with 3 degrees of freedom."""


@pytest.mark.parametrize(
    ("drafts", "choices", "expected"),
    [
        ([5, 6, 7], [5, 6, 7, 8], Verdict(3, 8)),
        ([5, 6, 7], [5, 9, 7, 8], Verdict(1, 9)),
        ([5, 6, 7], [1, 6, 7, 8], Verdict(0, 1)),
        ([], [4], Verdict(0, 4)),
    ],
)
def test_greedy_keeps_drafts_up_to_first_difference(drafts, choices, expected):
    assert verify_greedy(drafts, choices) == expected


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
    for seed in range(50):
        verdict = verify_sampled(torch.tensor([0]), p_draft, p_target, torch.Generator().manual_seed(seed))
        assert verdict == Verdict(1, 2)  # bonus comes from the target's next row


def test_draft_surely_rejected_when_target_excludes_it():
    # residual max(0, [0, .25, .75] − [.5, .5, 0]) = [0, 0, .75]: the correction is token 2
    p_draft = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]])
    p_target = torch.tensor([[0.0, 0.25, 0.75], [1.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    for seed in range(50):
        verdict = verify_sampled(torch.tensor([0, 0]), p_draft, p_target, torch.Generator().manual_seed(seed))
        assert verdict == Verdict(0, 2)  # the second draft would be accepted, but comes after a rejection


def test_impossible_draft_is_ratio_against_smallest_probability():
    # p_draft(x) = 0 is clamped to 1e-8: 0.5 / 1e-8 > 1, accepted
    verdict = verify_sampled(torch.tensor([1]), torch.tensor([[1.0, 0.0]]), torch.tensor([[0.5, 0.5], [1.0, 0.0]]))
    assert verdict == Verdict(1, 0)


def test_empty_residual_falls_back_to_target():
    # The draft (token 1) has probability 0 in both, so it is rejected; both rows are equal, so nothing is left over.
    row = torch.tensor([[1.0, 0.0]])
    assert verify_sampled(torch.tensor([1]), row, row.repeat(2, 1)) == Verdict(0, 0)


def test_no_draft_samples_target_row():
    p_target = torch.tensor([[0.0, 1.0, 0.0]])
    assert verify_sampled(torch.empty(0, dtype=torch.long), torch.empty(0, 3), p_target) == Verdict(0, 1)


def without_residual(drafts, p_draft, p_target, generator):
    """A wrong verifier: the correction is drawn from the target instead of the residual."""
    verdict = verify_sampled(drafts, p_draft, p_target, generator)
    if verdict.num_accepted == len(drafts):
        return verdict
    token = int(torch.multinomial(p_target[verdict.num_accepted], 1, generator=generator))
    return Verdict(verdict.num_accepted, token)


def accepting_likelier(drafts, p_draft, p_target, generator):
    """A wrong verifier: keeps a draft exactly if the target finds it likelier than the drafter does."""
    rows = torch.arange(len(drafts))
    keep = p_target[rows, drafts] >= p_draft[rows, drafts]
    num_accepted = int(keep.int().cumprod(0).sum())
    residual = p_target[num_accepted] - (p_draft[num_accepted] if num_accepted < len(drafts) else 0)
    return Verdict(num_accepted, int(torch.multinomial(residual.clamp_min(0), 1, generator=generator)))


def chi_square_by_position(verify):
    """Distance of the 1st and 2nd committed token from the target's rows 0 and 1 (3 degrees of freedom each)."""
    generator = torch.Generator().manual_seed(20)
    p_draft = DRAFT.repeat(2, 1)
    counts = torch.zeros(2, 4)
    drafts = torch.multinomial(DRAFT, 2 * NUM_TRIALS, replacement=True, generator=generator).view(NUM_TRIALS, 2)
    for pair in drafts:
        verdict = verify(pair, p_draft, TARGET, generator)
        committed = [*pair[: verdict.num_accepted].tolist(), verdict.next_token]
        for position, token in enumerate(committed[:2]):
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
    accepted = sum(verify_sampled(draft, DRAFT[None], TARGET[:2], generator).num_accepted for draft in drafts)
    assert accepted / NUM_TRIALS == pytest.approx(0.6, abs=0.025)
