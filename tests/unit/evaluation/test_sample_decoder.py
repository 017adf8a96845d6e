from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from untrained import DEMO_TARGET, save_untrained

from drafters.checkpoint import load_drafter
from evaluation.benchmark import BenchmarkSettings, Sample
from evaluation.decode import plain_generate, speculative_generate
from evaluation.loading import load_models
from evaluation.records import PlainRecord, SampleRecord, hash_of
from evaluation.sample_decoder import SampleDecoder, decoding_here
from evaluation.work import Work
from services.errors import CheckpointError
from services.models import read_shape
from services.stop_tokens import find_stop_token_ids

PROMPTS = ((5, 6, 7, 8), (9, 10, 11), (12, 13, 14, 15, 16, 17), (20, 21), (30, 31, 32))
SAMPLES = tuple(
    Sample(task="mbpp", domain="code", index=index, seed=70 + index, prompt_ids=prompt)
    for index, prompt in enumerate(PROMPTS)
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_untrained(tmp_path_factory.mktemp("drafter"))


def settings(checkpoint: Path, **changes) -> BenchmarkSettings:
    values = {"target": str(DEMO_TARGET), "drafter": str(checkpoint), "max_new_tokens": 12, "batch_size": 2}
    return BenchmarkSettings.model_validate(values | changes)


def decode(given: BenchmarkSettings, work: Work) -> list[SampleRecord | PlainRecord]:
    records: list[SampleRecord | PlainRecord] = []
    with decoding_here(given) as run:
        run([work], records.append)
    return records


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_records_say_what_each_sample_gives_alone(checkpoint, temperature):
    given = settings(checkpoint, temperature=temperature)
    records = {record.index: record for record in decode(given, Work(speculative=SAMPLES))}
    target = AutoModelForCausalLM.from_pretrained(DEMO_TARGET, dtype=torch.float32).eval()
    drafter = load_drafter(checkpoint)
    assert sorted(records) == list(range(len(PROMPTS)))
    for index, prompt in enumerate(PROMPTS):
        alone = speculative_generate(
            target,
            drafter,
            [list(prompt)],
            max_new_tokens=12,
            temperature=temperature,
            stop_token_ids=find_stop_token_ids(DEMO_TARGET),
            seed=70 + index,
        )
        new_tokens = alone.output_ids[0][len(prompt) :]
        record = records[index]
        assert list(record.accepted_lengths) == alone.accepted_lengths[0]
        assert list(record.proposal_lengths) == alone.proposal_lengths[0]
        assert list(record.accepted_draft_lengths) == alone.accepted_draft_lengths[0]
        assert record.output_hash == hash_of(new_tokens)
        assert record.num_new_tokens == len(new_tokens)
        assert (record.prompt_hash, record.seed) == (hash_of(prompt), 70 + index)


def test_plain_records_are_the_targets_own_output(checkpoint):
    records = decode(settings(checkpoint, temperature=1.0), Work(plain=SAMPLES))
    target = AutoModelForCausalLM.from_pretrained(DEMO_TARGET, dtype=torch.float32).eval()
    for record in records:
        prompt = PROMPTS[record.index]
        [alone] = plain_generate(
            target,
            [list(prompt)],
            max_new_tokens=12,
            temperature=1.0,
            stop_token_ids=find_stop_token_ids(DEMO_TARGET),
            seed=70 + record.index,
        )
        assert isinstance(record, PlainRecord)
        assert record.output_hash == hash_of(alone[len(prompt) :])
    assert len(records) == len(PROMPTS)


def test_greedy_output_is_the_same_with_and_without_the_drafter(checkpoint):
    records = decode(settings(checkpoint, temperature=0.0), Work(speculative=SAMPLES, plain=SAMPLES))
    ours = {record.index: record.output_hash for record in records if isinstance(record, SampleRecord)}
    own = {record.index: record.output_hash for record in records if isinstance(record, PlainRecord)}
    assert ours == own
    assert len(ours) == len(PROMPTS)


def test_shares_of_time_cover_every_phase(checkpoint):
    records = decode(settings(checkpoint), Work(speculative=SAMPLES, plain=SAMPLES))
    for record in records:
        assert record.timing.prefill_s > 0
        assert record.timing.verify_s > 0
        assert (record.timing.draft_s > 0) or isinstance(record, PlainRecord)


def test_confidence_is_recorded_for_every_drafted_token(checkpoint):
    records = decode(settings(checkpoint), Work(speculative=SAMPLES))
    for record in records:
        assert isinstance(record, SampleRecord)
        assert record.confidence is not None
        assert len(record.confidence) == len(record.accepted_lengths)
        assert all(
            len(logits) >= length for logits, length in zip(record.confidence, record.proposal_lengths, strict=True)
        )


def test_drafter_without_the_head_records_no_confidence(tmp_path):
    checkpoint = save_untrained(tmp_path, algorithm="dflash", markov_rank=0, enable_confidence_head=False)
    [record] = decode(settings(checkpoint), Work(speculative=SAMPLES[:1]))
    assert isinstance(record, SampleRecord)
    assert record.confidence is None


def test_output_that_leaves_the_targets_own_is_located(checkpoint, monkeypatch):
    given = settings(checkpoint, temperature=0.0)
    same = decode(given, Work(speculative=SAMPLES, plain=SAMPLES))
    assert {record.divergence for record in same if isinstance(record, PlainRecord)} == {None}

    def spoilt(self, samples, drafter, on_record, others):
        others = {key: [*tokens[:-2], tokens[-2] ^ 1, tokens[-1]] for key, tokens in others.items()}
        return run(self, samples, drafter, on_record, others)

    run = SampleDecoder._run
    monkeypatch.setattr(SampleDecoder, "_run", spoilt)
    records = decode(given, Work(speculative=SAMPLES[1:2], plain=SAMPLES[:2]))
    first, second = sorted((record for record in records if isinstance(record, PlainRecord)), key=lambda r: r.index)
    assert first.divergence is None, "it was not decoded by both sides in one go"
    found = second.divergence
    assert (found.sample, found.position, found.within_rounding) == (1, 12 - 2, False)
    assert found.our_token == found.target_token ^ 1
    assert found.top2_gap > 0


@pytest.mark.parametrize("work", [Work(speculative=SAMPLES[:1]), Work(plain=SAMPLES[:1])])
@pytest.mark.parametrize(("measure_speedup", "warmed"), [(True, 1), (False, 0)])
def test_what_is_timed_begins_warm_once(checkpoint, monkeypatch, work, measure_speedup, warmed):
    begun: list[Sample] = []
    warm_up = SampleDecoder._warm_up

    def counted(self, sample):
        begun.append(sample)
        warm_up(self, sample)

    monkeypatch.setattr(SampleDecoder, "_warm_up", counted)
    with decoding_here(settings(checkpoint, measure_speedup=measure_speedup)) as run:
        run([work, work], lambda record: None)
    assert len(begun) == warmed


def other_target(folder: Path, **changes) -> Path:
    """The demo's target by another config, without its weights: none are needed to refuse it."""
    shutil.copytree(DEMO_TARGET, folder)
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_drafter_of_a_target_with_another_fingerprint_is_refused(tmp_path):
    fingerprint = read_shape(DEMO_TARGET).fingerprint
    checkpoint = save_untrained(tmp_path / "d", provenance={"model": "demo", "fingerprint": fingerprint})
    load_models(settings(checkpoint))
    target = other_target(tmp_path / "t", max_position_embeddings=4096)
    with pytest.raises(CheckpointError, match=rf"trained with demo \(fingerprint {fingerprint}\).*--other-target"):
        load_models(settings(checkpoint, target=str(target)))
    load_models(settings(checkpoint, target=str(target), allow_other_target=True))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": 96, "num_attention_heads": 3}, "hidden_size 160, the target has 96"),
        ({"vocab_size": 500}, "vocab_size 512, the target has 500"),
        ({"num_hidden_layers": 4}, r"reads target layers \[1, 5\], the target has 4 layers"),
        ({"num_hidden_layers": 7}, "made for a target of 8 layers, this one has 7"),
        (
            {"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
            "made for a qwen3 target, this one is a llama",
        ),
    ],
)
def test_drafter_of_a_target_of_another_shape_is_refused(tmp_path, checkpoint, changes, words):
    target = tmp_path / "t"
    shutil.copytree(DEMO_TARGET, target, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((target / "config.json").read_text()) | changes
    if "num_hidden_layers" in changes:
        config["layer_types"] = config["layer_types"][: changes["num_hidden_layers"]]
    (target / "config.json").write_text(json.dumps(config))
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(target)).save_pretrained(target)
    with pytest.raises(CheckpointError, match=words):
        load_models(settings(checkpoint, target=str(target)))


@pytest.mark.parametrize("text", ["{", "[]", '{"target": 3}', '{"target": {"enable_thinking": "perhaps"}}'])
def test_spoiled_provenance_is_named(tmp_path, text):
    checkpoint = save_untrained(tmp_path)
    (checkpoint / "provenance.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"provenance\.json does not say"):
        load_models(settings(checkpoint))


def test_folder_without_a_drafter_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"no drafter checkpoint.*--drafter"):
        load_models(settings(tmp_path))
