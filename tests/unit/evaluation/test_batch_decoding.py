"""Many rows at once: each row's result is the one that it has alone."""

import pytest
import torch
from tiny_decoding import FixedDistributionDrafter, ScriptedDrafter, tiny_target

from drafters import build_drafter
from drafters.drafter import Proposal
from evaluation import plain_generate, speculative_generate
from evaluation.batch_decoder import BatchDecoder, cut_below

VOCAB = 37
ALGORITHMS = {
    "dspark": {"block_size": 4, "num_draft_layers": 2, "markov_rank": 4, "mask_token_id": 1},
    "dflash": {"block_size": 4, "num_draft_layers": 2, "mask_token_id": 1, "permute_context": True},
    "eagle3": {"ttt_length": 4},
}


@pytest.fixture(scope="module")
def target():
    return tiny_target(num_layers=8, seed=7)


@pytest.fixture(scope="module")
def prompts():
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(VOCAB, (length,), generator=generator) for length in (9, 1, 30, 4, 9)]


@pytest.fixture(scope="module", params=ALGORITHMS)
def drafter(request, target):
    torch.manual_seed(1)
    return build_drafter(target.config, request.param, target_layer_ids=range(5), **ALGORITHMS[request.param]).eval()


def rows_of(output):
    return list(
        zip(
            output.output_ids,
            output.accepted_lengths,
            output.proposal_lengths,
            output.accepted_draft_lengths,
            strict=True,
        )
    )


@pytest.mark.parametrize("temperature", [0.0, 1.5])
@pytest.mark.parametrize("batch_size", [None, 2])
def test_rows_decode_as_if_alone(target, drafter, prompts, temperature, batch_size):
    """With two rows at once, those that end make room for others of other lengths."""
    options = {"max_new_tokens": 20, "temperature": temperature, "stop_token_ids": (3, 8, 11, 20)}
    together = speculative_generate(target, drafter, prompts, seed=50, batch_size=batch_size, **options)
    alone = [
        rows_of(speculative_generate(target, drafter, [prompt], seed=50 + row, **options))[0]
        for row, prompt in enumerate(prompts)
    ]
    assert rows_of(together) == alone
    assert len({len(ids) - len(prompt) for ids, prompt in zip(together.output_ids, prompts, strict=True)}) > 1


@pytest.mark.parametrize("threshold", [0.45, 0.55])
def test_thresholds_cut_each_row_by_itself(target, prompts, threshold):
    torch.manual_seed(4)
    drafter = build_drafter(target.config, "dspark", target_layer_ids=range(5), **ALGORITHMS["dspark"]).eval()
    drafter.confidence_head.proj.weight.data.mul_(20)
    options = {"max_new_tokens": 20, "confidence_threshold": threshold}
    together = speculative_generate(target, drafter, prompts, **options)
    alone = [rows_of(speculative_generate(target, drafter, [prompt], **options))[0] for prompt in prompts]
    assert rows_of(together) == alone
    assert len({length for lengths in together.proposal_lengths for length in lengths}) > 1
    assert together.output_ids == plain_generate(target, prompts, max_new_tokens=20)


def test_proposal_is_cut_before_the_first_slot_below_the_threshold():
    confidence = torch.tensor([[0.9, 0.5, 0.8], [0.4, 0.9, 0.9], [0.9, 0.8, 0.7]]).logit()
    proposal = Proposal(torch.arange(9).view(3, 3), confidence=confidence)
    cut = cut_below(0.6)
    assert cut(proposal).tolist() == [1, 0, 3]
    left = proposal.shortened(cut(proposal))
    assert left.lengths.tolist() == [1, 0, 3]
    assert left.token_ids.shape == (3, 3)
    shorter = Proposal(proposal.token_ids, torch.tensor([3, 3, 1]), confidence=confidence).shortened(cut(proposal))
    assert shorter.lengths.tolist() == [1, 0, 1]
    assert shorter.token_ids.tolist() == [[0], [3], [6]]


def test_no_threshold_never_cuts_and_none_cuts_without_confidence():
    assert cut_below(0.0) is None
    assert cut_below(1.0)(Proposal(torch.zeros(2, 4))).tolist() == [4, 4]


def test_plain_rows_decode_as_if_alone(target, prompts):
    for options in ({}, {"temperature": 1.5, "seed": 9}):
        together = plain_generate(target, prompts, max_new_tokens=12, batch_size=3, stop_token_ids=[3], **options)
        for row, prompt in enumerate(prompts):
            own = options | ({"seed": 9 + row} if options else {})
            assert plain_generate(target, [prompt], max_new_tokens=12, stop_token_ids=[3], **own) == [together[row]]


def test_a_round_is_one_forward_pass_whatever_the_number_of_rows(target, prompts):
    drafter, passes = ScriptedDrafter(lambda num_context: [0, 0]), []
    handle = target.model.register_forward_hook(lambda module, inputs, output: passes.append(output[0].shape[:2]))
    try:
        output = speculative_generate(target, drafter, prompts, max_new_tokens=6)
    finally:
        handle.remove()
    most = max(map(len, output.accepted_lengths))
    assert passes[:4] == [(1, 1), (1, 4), (2, 9), (1, 30)]  # prompts: only those of like lengths are padded together
    assert passes[4] == (5, 3)
    assert len(passes) == 4 + most


def test_rows_that_have_ended_leave_the_batch(target, prompts):
    own = plain_generate(target, prompts, max_new_tokens=8)
    stop = own[2][len(prompts[2]) + 1]
    sizes = []
    with BatchDecoder(
        target,
        ScriptedDrafter(lambda num_context: []),
        max_rows=5,
        max_new_tokens=8,
        stop_token_ids=[stop],
        on_round=lambda record: sizes.append(len(record.rows)),
    ) as decoder:
        rows = decoder.run([prompt.tolist() for prompt in prompts])
    assert [row.index for row in rows] == list(range(5))
    assert sizes[0] == 5
    assert sizes[-1] < 5
    assert rows[2].tokens == own[2][: len(prompts[2]) + 2]


def test_watchers_see_each_round_of_each_row_with_its_confidence(target, prompts):
    torch.manual_seed(4)
    drafter = build_drafter(target.config, "dspark", target_layer_ids=range(5), **ALGORITHMS["dspark"]).eval()
    seen = {}

    def watch(record):
        assert record.proposal.confidence.shape == (len(record.rows), 4)
        for row in record.rows:
            seen.setdefault(row.index, []).append(row.rounds[-1])

    with BatchDecoder(target, drafter, max_rows=2, max_new_tokens=10, cut=cut_below(0.99), on_round=watch) as decoder:
        rows = decoder.run([prompt.tolist() for prompt in prompts])
    assert [seen[row.index] for row in rows] == [row.rounds for row in rows]
    assert {entry.proposed for row in rows for entry in row.rounds} == {0}


def test_rows_that_join_read_nothing_of_those_whose_place_they_take(target):
    """A long row, then a short one in its place: what the long one left there stays hidden."""
    drafter = FixedDistributionDrafter(torch.full((VOCAB,), 1 / VOCAB), block_size=3)
    options = {"max_new_tokens": 10, "temperature": 1.0}
    output = speculative_generate(target, drafter, [list(range(30)), [4]], batch_size=1, **options)
    alone = speculative_generate(target, drafter, [[4]], seed=1, **options)
    assert output.output_ids[1] == alone.output_ids[0]


def test_attention_of_the_target_is_put_back(target, prompts):
    before = target.config._attn_implementation
    plain_generate(target, prompts, max_new_tokens=2)
    assert target.config._attn_implementation == target.model.config._attn_implementation == before == "sdpa"


def test_eager_attention_decodes_the_same(prompts):
    target = tiny_target(num_layers=8, seed=7)
    expected = plain_generate(target, prompts, max_new_tokens=12)
    target.set_attn_implementation("eager")
    assert plain_generate(target, prompts, max_new_tokens=12) == expected


def test_attention_without_masks_is_refused(prompts):
    target = tiny_target()
    target.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="attention 'flex_attention', which takes no mask by position"):
        plain_generate(target, prompts, max_new_tokens=2)


def test_layers_that_keep_other_states_are_refused(prompts):
    target = tiny_target()
    target.config.layer_types = ["linear_attention", "full_attention", "full_attention"]
    with pytest.raises(ValueError, match="qwen3 target: its layers of kind linear_attention"):
        plain_generate(target, prompts, max_new_tokens=2)
