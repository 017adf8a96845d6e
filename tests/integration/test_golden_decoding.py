"""Greedy decoding of small trained targets, round by round as the reference toolkit decoded them.

Each `tests/golden/decode_*` folder holds a target, a drafter and, for some prompts, output ids and the lengths of every
round; with a confidence head at two thresholds.
"""

import json
import os
import shutil
from pathlib import Path

import psutil
import pytest
import ray
import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from drafters import build_drafter, load_drafter, save_drafter
from evaluation import EvaluationConfig, Evaluator, greedy_generate, plain_generate, speculative_generate
from evaluation.actor import LOWEST_PRIORITY, EvaluatorActor
from evaluation.weights import weights_digest
from services.contracts import HeldoutPrompt
from services.errors import CheckpointError, PromptError
from services.models import read_shape

CASE = Path(__file__).parents[1] / "golden" / "decode_dspark_qwen3"
DECODE = json.loads((CASE / "decode.json").read_text())
MAX_NEW_TOKENS = DECODE["max_new_tokens"]
START_S = 300.0
STOPS = DECODE["stop_token_ids"]
BY_THRESHOLD = {
    threshold: [result for result in DECODE["results"] if result["threshold"] == threshold] for threshold in (0.0, 0.3)
}


def write_checkpoint(case_folder, folder):
    """The golden drafter as a native checkpoint folder."""
    case = json.loads((case_folder / "case.json").read_text())
    (folder / "config.json").write_text(json.dumps(case["draft_config"]))
    shutil.copy(case_folder / "weights.safetensors", folder / "model.safetensors")
    return folder


def load_target(case_folder):
    return AutoModelForCausalLM.from_pretrained(case_folder / "target", dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(CASE, tmp_path_factory.mktemp("drafter"))


@pytest.fixture(scope="module")
def drafter(checkpoint):
    return load_drafter(checkpoint, dtype=torch.float32)


@pytest.fixture(scope="module")
def target():
    return load_target(CASE)


@pytest.mark.parametrize(
    ("name", "threshold", "num_prompts"),
    [
        ("decode_dspark_qwen3", 0.0, 6),
        ("decode_dspark_qwen3", 0.3, 6),
        ("decode_dspark_gemma4", 0.0, 4),
        ("decode_dspark_gemma4", 0.3, 4),
        ("decode_dflash_qwen3", 0.0, 6),
    ],
)
def test_rounds_equal_the_reference(tmp_path, name, threshold, num_prompts):
    folder = CASE.parent / name
    decode = json.loads((folder / "decode.json").read_text())
    results = [result for result in decode["results"] if result["threshold"] == threshold]
    assert len(results) == num_prompts
    output = speculative_generate(
        load_target(folder),
        load_drafter(write_checkpoint(folder, tmp_path), dtype=torch.float32),
        [torch.tensor(result["prompt"]) for result in results],
        max_new_tokens=decode["max_new_tokens"],
        temperature=decode["temperature"],
        stop_token_ids=decode["stop_token_ids"],
        confidence_threshold=threshold,
    )
    assert output.output_ids == [result["output_ids"] for result in results]
    assert output.proposal_lengths == [result["proposal_lengths"] for result in results]
    assert output.accepted_draft_lengths == [result["accepted_draft_lengths"] for result in results]
    assert output.accepted_lengths == [result["acceptance_lengths"] for result in results]


def test_own_greedy_output_equals_the_reference(target):
    prompts = [result["prompt"] for result in BY_THRESHOLD[0.0]]
    expected = [result["output_ids"] for result in BY_THRESHOLD[0.0]]
    options = {"max_new_tokens": MAX_NEW_TOKENS, "stop_token_ids": STOPS}
    assert [greedy_generate(target, prompt, **options) for prompt in prompts] == expected
    assert plain_generate(target, prompts, **options) == expected
    assert plain_generate(target, prompts, batch_size=4, **options) == expected


def test_sampled_output_is_distributed_as_the_targets(target, drafter):
    """New tokens 2 and 3 at temperature 1.5, over 900 rows: drafts are the drafter's own samples here.

    Chi-square over the pairs that are expected at least 8 times, all others in one cell.
    """
    prompt, num_rows, temperature = BY_THRESHOLD[0.0][0]["prompt"], 900, 1.5
    output = speculative_generate(target, drafter, [prompt] * num_rows, max_new_tokens=3, temperature=temperature)
    expected = num_rows * pair_probabilities(target, prompt, temperature)
    counts = torch.zeros_like(expected)
    for tokens in output.output_ids:
        counts[tokens[len(prompt) + 1], tokens[len(prompt) + 2]] += 1
    common = expected >= 8
    observed = torch.cat([counts[common], counts[~common].sum()[None]])
    wanted = torch.cat([expected[common], expected[~common].sum()[None]])
    degrees = len(wanted) - 1
    assert degrees >= 5
    statistic = float(((observed - wanted) ** 2 / wanted).sum())
    # mean `degrees`, variance 2 · `degrees`: five standard deviations
    assert statistic < degrees + 5 * (2 * degrees) ** 0.5
    accepted = [length for rounds in output.accepted_draft_lengths for length in rounds]
    assert 0 < sum(accepted) / len(accepted) < 5  # drafts were both kept and refused


def pair_probabilities(target, prompt, temperature):
    """Joint distribution of new tokens 2 and 3, [V, V], by summing over token 1."""
    vocab_size = target.config.vocab_size
    singles = torch.arange(vocab_size)[:, None]
    pairs = torch.cartesian_prod(torch.arange(vocab_size), torch.arange(vocab_size))
    with torch.inference_mode():

        def next_distribution(continuations):
            ids = torch.cat([torch.tensor([prompt]).expand(len(continuations), -1), continuations], dim=1)
            return torch.softmax(target(ids, logits_to_keep=1).logits[:, -1].float() / temperature, dim=-1)

        first = torch.softmax(target(torch.tensor([prompt])).logits[0, -1].float() / temperature, dim=-1)
        second = next_distribution(singles)
        third = next_distribution(pairs).view(vocab_size, vocab_size, vocab_size)
    return torch.einsum("a,ab,abc->bc", first, second, third)


def golden_prompts():
    return [
        HeldoutPrompt(token_ids=result["prompt"], domain=("math", "code")[index % 2])
        for index, result in enumerate(BY_THRESHOLD[0.0])
    ]


def make_evaluator(**settings):
    config = EvaluationConfig(max_new_tokens=MAX_NEW_TOKENS, **settings)
    return Evaluator(str(CASE / "target"), golden_prompts(), config, dtype="float32")


def test_evaluator_reports_the_reference_figures(checkpoint):
    results = BY_THRESHOLD[0.0]
    committed = [length for result in results for length in result["acceptance_lengths"]]
    kept = [length for result in results for length in result["accepted_draft_lengths"]]
    report = make_evaluator().evaluate(str(checkpoint), "golden")
    assert report.label == "golden"
    assert report.checkpoint == str(checkpoint)
    assert report.accepted_length == sum(committed) / len(committed)
    assert report.interval[0] < report.accepted_length < report.interval[1]
    assert report.accept_rate == tuple(sum(length > k for length in kept) / len(kept) for k in range(5))
    assert report.num_samples == 6
    assert report.num_rounds == len(committed)
    assert report.num_tokens == sum(len(result["output_ids"]) - len(result["prompt"]) for result in results)
    assert report.lossless is True
    assert report.first_divergence is None
    assert report.seconds > 0


@pytest.mark.parametrize("batch_size", [1, 4])
def test_evaluator_finds_the_same_whatever_the_batch(checkpoint, batch_size):
    expected = make_evaluator().evaluate(str(checkpoint), "golden")
    report = make_evaluator(batch_size=batch_size).evaluate(str(checkpoint), "golden")
    assert report.model_copy(update={"seconds": 0.0}) == expected.model_copy(update={"seconds": 0.0})


def test_evaluator_skips_and_counts_prompts_longer_than_the_context(checkpoint):
    prompts = [HeldoutPrompt(token_ids=[1] * 513), *golden_prompts()[:2]]
    config = EvaluationConfig(max_new_tokens=MAX_NEW_TOKENS)
    report = Evaluator(str(CASE / "target"), prompts, config).evaluate(str(checkpoint), "long")
    assert (report.num_skipped, report.num_samples) == (1, 2)
    with pytest.raises(PromptError, match=r"all 1 held-out prompts are longer than the target's context of 512 tokens"):
        Evaluator(str(CASE / "target"), prompts[:1], config)


def test_evaluator_reports_by_domain_and_over_the_first_samples(checkpoint):
    evaluator = make_evaluator()
    few, report = evaluator.evaluate(str(checkpoint), "few", 3, threads=1), evaluator.evaluate(str(checkpoint), "all")
    assert few.accepted_length == report.accepted_length_of_first(3)
    assert few.samples == report.samples[:3]
    assert few.weights == report.weights == weights_digest(checkpoint)
    for domain, results in (("math", BY_THRESHOLD[0.0][::2]), ("code", BY_THRESHOLD[0.0][1::2])):
        found = report.domains[domain]
        committed = [length for result in results for length in result["acceptance_lengths"]]
        assert found.num_samples == len(results)
        assert found.accepted_length == sum(committed) / len(committed)
        assert found.interval[0] <= found.accepted_length <= found.interval[1]
        kept = [length for result in results for length in result["accepted_draft_lengths"]]
        assert found.accept_rate[0] == sum(length > 0 for length in kept) / len(kept)


def test_evaluator_decodes_the_first_samples_only(checkpoint):
    report = make_evaluator(max_samples=2).evaluate(str(checkpoint), "two")
    assert report.num_samples == 2
    assert report.num_rounds == sum(len(result["acceptance_lengths"]) for result in BY_THRESHOLD[0.0][:2])


def test_evaluator_claims_nothing_about_sampled_output(checkpoint):
    report = make_evaluator(temperature=1.0, max_samples=2).evaluate(str(checkpoint), "sampled")
    assert report.lossless is None
    again = make_evaluator(temperature=1.0, max_samples=2).evaluate(str(checkpoint), "sampled")
    assert report.model_copy(update={"seconds": 0.0}) == again.model_copy(update={"seconds": 0.0})


def test_evaluator_finds_where_output_leaves_the_targets(checkpoint):
    evaluator = make_evaluator(max_samples=2)
    own = list(evaluator._own_output(2)[1])
    evaluator._references[1] = [*own[:10], own[10] + 1, *own[11:]]
    report = evaluator.evaluate(str(checkpoint), "tampered")
    assert report.lossless is False
    divergence = report.first_divergence
    assert (divergence.sample, divergence.position) == (1, 10 - len(BY_THRESHOLD[0.0][1]["prompt"]))
    assert (divergence.target_token, divergence.our_token) == (own[10] + 1, own[10])
    assert divergence.top2_gap > 0
    assert divergence.token_gap < 0  # the target prefers what was decoded: the reference was tampered with
    assert not divergence.within_rounding


@pytest.mark.parametrize(
    ("changes", "layer_ids", "message"),
    [
        ({"vocab_size": 50}, (0, 1), "vocab_size 50, the target has 61"),
        ({"hidden_size": 16}, (0, 1), "hidden_size 16, the target has 32"),
        ({"num_hidden_layers": 12, "layer_types": ["full_attention"] * 12}, (0, 9), "the target has 6 layers"),
    ],
)
def test_evaluator_refuses_drafter_of_another_target(target, tmp_path, changes, layer_ids, message):
    config = Qwen3Config.from_dict({**target.config.to_dict(), **changes})
    settings = {"num_draft_layers": 1, "block_size": 3, "markov_rank": 4, "mask_token_id": 40}
    save_drafter(build_drafter(config, algorithm="dspark", target_layer_ids=layer_ids, **settings), tmp_path)
    with pytest.raises(CheckpointError, match=message):
        make_evaluator().evaluate(str(tmp_path), "stranger")


def test_evaluator_refuses_drafter_of_another_family(tmp_path):
    with pytest.raises(CheckpointError, match="was made for a gemma4_text target, this one is a qwen3"):
        make_evaluator().evaluate(str(write_checkpoint(CASE.parent / "decode_dspark_gemma4", tmp_path)), "stranger")


def test_evaluator_refuses_drafter_trained_with_another_fingerprint(tmp_path):
    write_checkpoint(CASE, tmp_path)

    def evaluate_as_trained_with(fingerprint):
        (tmp_path / "provenance.json").write_text(json.dumps({"target": {"fingerprint": fingerprint}}))
        return make_evaluator(max_samples=1).evaluate(str(tmp_path), "stranger")

    with pytest.raises(CheckpointError, match=r"\(fingerprint f00\), but the target at .* has fingerprint"):
        evaluate_as_trained_with("f00")
    assert evaluate_as_trained_with(read_shape(CASE / "target").fingerprint).num_samples == 1


def test_evaluator_refuses_folder_without_drafter(tmp_path):
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        make_evaluator().evaluate(str(tmp_path), "nothing")


@pytest.fixture
def watched_actor():
    """An evaluator that says how it decoded last. It is local, so that it travels to workers by value."""

    class Watched(EvaluatorActor):
        def __init__(self, *args):
            super().__init__(*args)
            self._how = None
            decode = self._evaluator.evaluate

            def evaluate(*args, **options):
                report = decode(*args, **options)
                self._how = torch.get_num_threads(), os.getpriority(os.PRIO_PROCESS, 0)
                return report

            self._evaluator.evaluate = evaluate

        def how(self):
            """Torch threads and priority of the thread that decoded, and the priority of the process."""
            return *self._how, psutil.Process().nice()

    return ray.remote(Watched).options(num_cpus=0)


def test_evaluator_on_the_targets_cpus_decodes_with_one_thread_of_lowest_priority(
    ray_cluster, watched_actor, checkpoint, tmp_path
):
    config = EvaluationConfig(max_new_tokens=MAX_NEW_TOKENS, threads=2, placement="share_target")
    actor = watched_actor.remote(str(CASE / "target"), golden_prompts()[:2], config, True)
    try:
        report = ray.get(actor.evaluate.remote(str(checkpoint), "step_0", 2, during=True), timeout=START_S)
        num_threads, priority, _ = ray.get(actor.how.remote(), timeout=START_S)
        assert (num_threads, priority) == (1, LOWEST_PRIORITY)
        ray.get(actor.evaluate.remote(str(checkpoint), "step_0", 2), timeout=START_S)
        num_threads, priority, usual = ray.get(actor.how.remote(), timeout=START_S)
        assert (num_threads, priority) == (2, usual)
        with pytest.raises(CheckpointError, match=r"config\.json"):
            ray.get(actor.evaluate.remote(str(tmp_path), "nothing", 2), timeout=START_S)
    finally:
        ray.kill(actor)
    assert report.lossless is True
    local = make_evaluator(max_samples=2).evaluate(str(checkpoint), "step_0")
    assert report.model_copy(update={"seconds": 0.0}) == local.model_copy(update={"seconds": 0.0})
