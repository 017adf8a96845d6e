import math

import pytest
import torch
from tiny_decoding import FixedDistributionDrafter, ScriptedDrafter, tiny_target

from drafters import build_drafter
from drafters.sampling import draw_tokens
from evaluation.accept import Verdicts, verify_sampled
from evaluation.decode import greedy_generate, speculative_generate

PROMPT = [5, 11, 2, 30]
NUM_PROMPT = len(PROMPT)


@pytest.fixture(scope="module")
def target():
    return tiny_target(seed=7)


@pytest.fixture(scope="module")
def own_output(target):
    """The target's greedy output without any cache: prompt and 24 new tokens."""
    tokens = list(PROMPT)
    with torch.inference_mode():
        for _ in range(24):
            tokens.append(int(target(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
    assert len(set(tokens[NUM_PROMPT : NUM_PROMPT + 4])) == 4  # tests below stop at one of these
    return tokens


def oracle(own_output, num_drafts=3, wrong_slot=None):
    """Drafts the target's own continuation, but for one slot."""

    def script(num_context):
        drafts = own_output[num_context + 1 : num_context + 1 + num_drafts]
        if wrong_slot is not None:
            drafts[wrong_slot] = (drafts[wrong_slot] + 1) % 37
        return drafts

    return ScriptedDrafter(script)


def lengths(output):
    return output.accepted_lengths[0], output.proposal_lengths[0], output.accepted_draft_lengths[0]


def test_greedy_generate_equals_decoding_without_cache(target, own_output):
    assert greedy_generate(target, PROMPT, max_new_tokens=24) == own_output


def test_greedy_generate_ends_with_its_stop_token(target, own_output):
    stop = own_output[NUM_PROMPT + 2]
    assert greedy_generate(target, PROMPT, max_new_tokens=24, stop_token_ids=[stop]) == own_output[: NUM_PROMPT + 3]


def test_perfect_drafts_commit_block_and_bonus(target, own_output):
    # prefill gives 1 token, each round 4: 1 + 4 + 4 = 9 are cut to 8
    output = speculative_generate(target, oracle(own_output), [torch.tensor(PROMPT)], max_new_tokens=8)
    assert output.output_ids == [own_output[: NUM_PROMPT + 8]]
    assert lengths(output) == ([4, 4], [3, 3], [3, 3])


def test_one_more_round_runs_when_exactly_the_limit_is_out(target, own_output):
    output = speculative_generate(target, oracle(own_output), [PROMPT], max_new_tokens=9)
    assert output.output_ids == [own_output[: NUM_PROMPT + 9]]
    assert lengths(output) == ([4, 4, 4], [3, 3, 3], [3, 3, 3])


def test_wrong_drafts_commit_one_token_a_round(target, own_output):
    output = speculative_generate(target, oracle(own_output, wrong_slot=0), [PROMPT], max_new_tokens=4)
    assert output.output_ids == [own_output[: NUM_PROMPT + 4]]
    assert lengths(output) == ([1, 1, 1, 1], [3, 3, 3, 3], [0, 0, 0, 0])


def test_partly_wrong_drafts_commit_prefix_and_correction(target, own_output):
    # 1 + 3 · 3 = 10 tokens: start is 9 < 10, so a fourth round runs
    output = speculative_generate(target, oracle(own_output, wrong_slot=2), [PROMPT], max_new_tokens=10)
    assert output.output_ids == [own_output[: NUM_PROMPT + 10]]
    assert lengths(output) == ([3, 3, 3, 3], [3, 3, 3, 3], [2, 2, 2, 2])


def test_empty_proposals_still_verify_the_anchor(target, own_output):
    output = speculative_generate(target, oracle(own_output, num_drafts=0), [PROMPT], max_new_tokens=3)
    assert output.output_ids == [own_output[: NUM_PROMPT + 3]]
    assert lengths(output) == ([1, 1, 1], [0, 0, 0], [0, 0, 0])


def test_accepted_stop_token_ends_the_round_without_bonus(target, own_output):
    stop = own_output[NUM_PROMPT + 2]  # second draft of the first round
    output = speculative_generate(target, oracle(own_output), [PROMPT], max_new_tokens=20, stop_token_ids=[stop])
    assert output.output_ids == [own_output[: NUM_PROMPT + 3]]
    assert lengths(output) == ([2], [2], [2])


def test_stop_token_as_bonus_counts_and_ends_the_row(target, own_output):
    stop = own_output[NUM_PROMPT + 3]
    drafter = oracle(own_output, num_drafts=2)  # drafts new tokens 1 and 2, the bonus is token 3
    output = speculative_generate(target, drafter, [PROMPT], max_new_tokens=20, stop_token_ids=[stop])
    assert output.output_ids == [own_output[: NUM_PROMPT + 4]]
    assert lengths(output) == ([3], [2], [2])


def test_stop_token_sampled_at_prefill_means_no_round(target, own_output):
    stop = own_output[NUM_PROMPT]
    output = speculative_generate(target, oracle(own_output), [PROMPT], max_new_tokens=20, stop_token_ids=[stop])
    assert output.output_ids == [own_output[: NUM_PROMPT + 1]]
    assert lengths(output) == ([], [], [])


def test_rejected_stop_token_does_not_end_the_row(target, own_output):
    stop = next(token for token in range(37) if token not in own_output)
    drafter = ScriptedDrafter(lambda num_context: [stop])
    output = speculative_generate(target, drafter, [PROMPT], max_new_tokens=5, stop_token_ids=[stop])
    assert output.output_ids == [own_output[: NUM_PROMPT + 5]]


def test_drafter_observes_features_of_committed_tokens_only(target, own_output):
    drafter = oracle(own_output, wrong_slot=1)
    speculative_generate(target, drafter, [PROMPT], max_new_tokens=7)
    state = drafter.observed[0]
    # prompt (4 rows), then rounds of 2 committed tokens while start < 7: 4 of them
    assert [len(rows) for rows in state.features] == [4, 2, 2, 2, 2]
    assert state.next_tokens == own_output[1:13]
    with torch.inference_mode():
        outputs = target.model(torch.tensor([own_output[:12]]), output_hidden_states=True, use_cache=False)
    # hidden_states[0] is the embedding (layer id -1), hidden_states[i + 1] the output of layer i
    expected = torch.cat([outputs.hidden_states[0], outputs.hidden_states[2]], dim=-1)[0]
    torch.testing.assert_close(torch.cat(state.features), expected, atol=1e-4, rtol=1e-4)


def test_head_sees_last_prompt_row_and_verified_rows_only(target, own_output):
    rows = []
    handle = target.lm_head.register_forward_hook(lambda module, inputs, output: rows.append(output.shape[1]))
    try:
        speculative_generate(target, oracle(own_output), [PROMPT], max_new_tokens=8)
    finally:
        handle.remove()
    assert rows == [1, 4, 4]


def test_no_hook_stays_on_the_target(target, own_output):
    hooks_before = [len(module._forward_hooks) for module in target.modules()]
    speculative_generate(target, oracle(own_output), [PROMPT], max_new_tokens=2)
    assert [len(module._forward_hooks) for module in target.modules()] == hooks_before


def test_rows_of_different_length_decode_as_if_alone(target):
    prompts = [[5, 11, 2, 30], [7], [1, 2, 3, 4, 5, 6, 7]]
    drafter = FixedDistributionDrafter(torch.full((37,), 1 / 37), block_size=3)
    options = {"max_new_tokens": 12, "temperature": 1.3}
    together = speculative_generate(target, drafter, prompts, seed=100, **options)
    for row, prompt in enumerate(prompts):
        alone = speculative_generate(target, drafter, [prompt], seed=100 + row, **options)
        assert alone.output_ids[0] == together.output_ids[row]
        assert alone.accepted_lengths[0] == together.accepted_lengths[row]


def test_two_dimensional_input_is_one_row_a_prompt(target):
    drafter = ScriptedDrafter(lambda num_context: [0])
    output = speculative_generate(target, drafter, torch.tensor([[1, 2], [3, 4]]), max_new_tokens=2)
    assert [ids[:2] for ids in output.output_ids] == [[1, 2], [3, 4]]


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[1], []], {"max_new_tokens": 4}, "prompt 1 is empty"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens is 0"),
        ([[1]], {"max_new_tokens": 4, "temperature": -1.0}, "temperature is -1.0"),
    ],
)
def test_impossible_arguments_are_refused(target, prompts, options, message):
    with pytest.raises(ValueError, match=message):
        speculative_generate(target, ScriptedDrafter(lambda num_context: []), prompts, **options)


CHI_SQUARE_15_AT_1E_4 = 44.3
"""Upper 1e-4 quantile of chi-square with 15 degrees of freedom."""


DRAFTERS = {
    "dspark": {"num_draft_layers": 1, "block_size": 2, "mask_token_id": 3, "markov_rank": 4},
    "dflash": {"num_draft_layers": 1, "block_size": 2, "mask_token_id": 3},
    "eagle3": {"ttt_length": 2, "layout": "llama"},
}


def two_drafts(name, target):
    """A drafter of the target that nobody has trained, or one that draws from one distribution."""
    if name == "fixed":
        return FixedDistributionDrafter(torch.tensor([0.7, 0.1, 0.1, 0.1]), block_size=2)
    torch.manual_seed(5)
    return build_drafter(target.config, name, target_layer_ids=(0, 1, 2), **DRAFTERS[name]).eval()


def chi_square_of_pairs(name):
    """Second and third new token, jointly, over 2000 rows with seeds of their own: 4 · 4 − 1 degrees of freedom."""
    vocab_size, num_rows, temperature = 4, 2000, 3.0
    target = tiny_target(vocab_size=vocab_size, num_layers=4, seed=3)
    drafter = two_drafts(name, target)
    output = speculative_generate(target, drafter, [[1, 2]] * num_rows, max_new_tokens=3, temperature=temperature)

    triples = torch.cartesian_prod(*[torch.arange(vocab_size)] * 3)
    with torch.inference_mode():
        sequences = torch.cat([torch.tensor([[1, 2]]).expand(len(triples), 2), triples], dim=1)
        rows = torch.log_softmax(target(sequences).logits[:, 1:4] / temperature, dim=-1)
    joint = rows.gather(2, triples[:, :, None]).sum(dim=(1, 2)).exp().view([vocab_size] * 3)
    expected = num_rows * joint.sum(dim=0)
    counts = torch.zeros(vocab_size, vocab_size)
    for tokens in output.output_ids:
        counts[tokens[3], tokens[4]] += 1
    assert math.isclose(float(expected.sum()), num_rows, rel_tol=1e-4)
    assert float(expected.min()) > 5  # else the statistic is no chi-square
    assert {length for rounds in output.accepted_draft_lengths for length in rounds} == {0, 1, 2}
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("name", ["fixed", *DRAFTERS])
def test_sampled_output_is_distributed_as_the_targets(name):
    assert chi_square_of_pairs(name) < CHI_SQUARE_15_AT_1E_4


def without_residual(proposal, p_target, uniforms):
    """A wrong verifier: the correction is drawn from the target instead of the residual."""
    num_accepted, _ = verify_sampled(proposal, p_target, uniforms)
    rows = p_target[torch.arange(len(num_accepted)), num_accepted]
    return Verdicts(num_accepted, draw_tokens(rows, uniforms[:, -1]))


def lenient(proposal, p_target, uniforms):
    """A wrong verifier: accepts drafts a third more often than it may."""
    return verify_sampled(proposal, p_target, torch.cat([uniforms[:, :-1] * 0.75, uniforms[:, -1:]], dim=1))


@pytest.mark.parametrize("name", ["fixed", *DRAFTERS])
@pytest.mark.parametrize("biased", [without_residual, lenient])
def test_biased_verifier_fails_the_same_test(monkeypatch, biased, name):
    monkeypatch.setattr("evaluation.batch_decoder.verify_sampled", biased)
    assert chi_square_of_pairs(name) > 2 * CHI_SQUARE_15_AT_1E_4


def test_prompt_longer_than_the_context_is_refused(target):
    drafter = ScriptedDrafter(lambda num_context: [])
    with pytest.raises(ValueError, match="prompt 1 has 257 tokens, more than the target's context of 256"):
        speculative_generate(target, drafter, [[1], [2] * 257], max_new_tokens=2)


def test_drafter_of_another_target_is_refused(target):
    drafter = ScriptedDrafter(lambda num_context: [], vocab_size=50)
    with pytest.raises(ValueError, match="this drafter has vocab_size 50, the target has 37"):
        speculative_generate(target, drafter, [[1]], max_new_tokens=2)
