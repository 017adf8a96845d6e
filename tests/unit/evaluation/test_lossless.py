import pytest
import torch
from tiny_decoding import tiny_target

from drafters import build_drafter
from evaluation.decode import greedy_generate, plain_generate, speculative_generate
from evaluation.lossless import find_divergence, first_difference, rounding_tolerance

PROMPT = [5, 11, 2, 30]


@pytest.mark.parametrize(
    ("ours", "reference", "index"),
    [([1, 2, 3], [1, 2, 3], None), ([1, 9, 3], [1, 2, 3], 1), ([1, 2], [1, 2, 3], 2), ([1, 2, 3], [1, 2], 2)],
)
def test_first_difference(ours, reference, index):
    assert first_difference(ours, reference) == index


def test_tolerance_is_zero_in_float32():
    assert rounding_tolerance(torch.tensor([3.0, -8.0])) == 0.0


def test_tolerance_is_four_steps_of_the_largest_logit_in_bfloat16():
    # bfloat16 has 8 significant bits: a step is 2^-7 of the value
    assert rounding_tolerance(torch.tensor([3.0, -8.0], dtype=torch.bfloat16)) == 4 * 8 / 128


def own_and_logits(target, position):
    """The target's own output, and its logits before new token `position`."""
    own = greedy_generate(target, PROMPT, max_new_tokens=8)
    with torch.inference_mode():
        return own, target(torch.tensor([own[: len(PROMPT) + position]]), use_cache=False).logits[0, -1].float()


def test_equal_output_has_no_divergence():
    target = tiny_target(seed=7)
    own = greedy_generate(target, PROMPT, max_new_tokens=8)
    assert find_divergence(target, own, own, sample=0, num_prompt_tokens=4) is None


def test_divergence_in_float32_is_never_rounding():
    target = tiny_target(seed=7)
    own, logits = own_and_logits(target, position=2)
    runner_up = int(logits.topk(2).indices[1])
    found = find_divergence(target, [*own[:6], runner_up, 0], own, sample=3, num_prompt_tokens=4)
    assert (found.sample, found.position, found.target_token, found.our_token) == (3, 2, own[6], runner_up)
    gap = float(logits.max() - logits[runner_up])
    assert found.top2_gap == pytest.approx(gap)
    assert found.token_gap == pytest.approx(gap)
    assert not found.within_rounding


def test_divergence_in_bfloat16_is_judged_by_the_gap_of_the_two_tokens():
    target = tiny_target(seed=7).to(torch.bfloat16)
    own, logits = own_and_logits(target, position=2)
    with torch.no_grad():  # another token gets the chosen one's row of the head: an exact tie
        target.lm_head.weight[36] = target.lm_head.weight[own[6]]
    tie = find_divergence(target, [*own[:6], 36], own, sample=0, num_prompt_tokens=4)
    assert tie.token_gap == 0.0
    assert tie.within_rounding
    least = int(logits.argmin())
    far = find_divergence(target, [*own[:6], least], own, sample=0, num_prompt_tokens=4)
    assert far.top2_gap == 0.0  # the tie above; what counts is the token that was decoded
    assert not far.within_rounding


def test_output_that_ended_early_is_no_rounding():
    target = tiny_target(seed=7).to(torch.bfloat16)
    own = greedy_generate(target, PROMPT, max_new_tokens=8)
    found = find_divergence(target, own[:-1], own, sample=0, num_prompt_tokens=4)
    assert (found.position, found.target_token, found.our_token) == (7, own[-1], None)
    assert found.token_gap is None
    assert not found.within_rounding


def test_batch_in_bfloat16_leaves_the_plain_output_by_rounding_alone():
    """γ + 1 rows and one row may round differently, on some processors more often than on others."""
    target = tiny_target(num_layers=6, seed=7).to(torch.bfloat16)
    generator = torch.Generator().manual_seed(2)
    prompts = [torch.randint(37, (length,), generator=generator).tolist() for length in range(3, 35)]
    torch.manual_seed(1)
    settings = {"block_size": 4, "num_draft_layers": 1, "mask_token_id": 1, "target_layer_ids": (0, 2)}
    drafter = build_drafter(target.config, "dflash", **settings).eval().to(torch.bfloat16)
    output = speculative_generate(target, drafter, prompts, max_new_tokens=40).output_ids
    own = plain_generate(target, prompts, max_new_tokens=40)

    def found(tokens_by_row):
        divergences = [
            find_divergence(target, ours, theirs, sample=sample, num_prompt_tokens=len(prompts[sample]))
            for sample, (ours, theirs) in enumerate(zip(tokens_by_row, own, strict=True))
        ]
        return [divergence for divergence in divergences if divergence is not None]

    assert all(divergence.within_rounding for divergence in found(output))
    wrong = [[*tokens[:-1], (tokens[-1] + 1) % 37] for tokens in output]
    assert not all(divergence.within_rounding for divergence in found(wrong))
