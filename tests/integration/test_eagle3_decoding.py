"""Greedy decoding with Eagle3, round by round as the reference toolkit did it: tests/golden/decode_eagle3_qwen3."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from drafters import load_drafter
from evaluation import greedy_generate, speculative_generate

CASE = Path(__file__).parents[1] / "golden" / "decode_eagle3_qwen3"
DECODE = json.loads((CASE / "decode.json").read_text())
RESULTS = DECODE["results"]


@pytest.fixture(scope="module")
def drafter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drafter")
    (folder / "config.json").write_text(json.dumps(json.loads((CASE / "case.json").read_text())["draft_config"]))
    shutil.copy(CASE / "weights.safetensors", folder / "model.safetensors")
    return load_drafter(folder)


@pytest.fixture(scope="module")
def target():
    return AutoModelForCausalLM.from_pretrained(CASE / "target", dtype=torch.float32).eval()


def decode(target, drafter, prompts, **options):
    options = {"max_new_tokens": DECODE["max_new_tokens"], "stop_token_ids": DECODE["stop_token_ids"]} | options
    return speculative_generate(target, drafter, prompts, **options)


def test_rounds_equal_the_reference(target, drafter):
    output = decode(target, drafter, [result["prompt"] for result in RESULTS])
    assert output.output_ids == [result["output_ids"] for result in RESULTS]
    assert output.accepted_lengths == [result["acceptance_lengths"] for result in RESULTS]
    assert output.proposal_lengths == [result["proposal_lengths"] for result in RESULTS]
    assert output.accepted_draft_lengths == [result["accepted_draft_lengths"] for result in RESULTS]


@pytest.mark.parametrize("stop", range(3))
def test_output_is_the_targets_own_with_stop_tokens_on_the_way(target, drafter, stop):
    """Each prompt's own output gives a stop token that comes up in the middle of it."""
    for result in RESULTS:
        new_tokens = result["output_ids"][len(result["prompt"]) :]
        stops = [new_tokens[4 + stop]]
        output = decode(target, drafter, [result["prompt"]], stop_token_ids=stops)
        own = greedy_generate(target, result["prompt"], max_new_tokens=DECODE["max_new_tokens"], stop_token_ids=stops)
        assert output.output_ids == [own]
        assert len(own) < len(result["output_ids"])


def test_drafted_stop_tokens_end_proposals_early(target, drafter):
    plain = decode(target, drafter, [result["prompt"] for result in RESULTS], stop_token_ids=())
    assert {length for rounds in plain.proposal_lengths for length in rounds} == {5}
    # a token that is often drafted and, for this prompt, never the target's choice
    prompt = RESULTS[5]["prompt"]
    unused = sorted(set(range(61)) - set(RESULTS[5]["output_ids"]))
    output = decode(target, drafter, [prompt], stop_token_ids=unused)
    assert output.output_ids == [RESULTS[5]["output_ids"]]
    lengths = output.proposal_lengths[0]
    assert min(lengths) < 5
    assert sum(output.accepted_lengths[0]) >= DECODE["max_new_tokens"] - 1


def test_sampled_output_follows_its_seed(target, drafter):
    prompts = [result["prompt"] for result in RESULTS[:2]]
    first, again, other = (
        decode(target, drafter, prompts, temperature=1.0, stop_token_ids=(), seed=seed).output_ids for seed in (3, 3, 4)
    )
    assert first == again != other
