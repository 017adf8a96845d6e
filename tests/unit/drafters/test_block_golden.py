"""DSpark and DFlash on Qwen3 and Gemma-4 against the reference toolkit's numbers; see tests/golden/README.md."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from drafters import FeatureBatch, load_drafter

GOLDEN = Path(__file__).parents[2] / "golden"
TOLERANCE = 1e-4
BATCH_KEYS = ("input_ids", "loss_mask", "attention_mask", "target_hidden_states", "target_last_hidden_states")


class Case:
    def __init__(self, name, folder):
        source = GOLDEN / name
        self.info = json.loads((source / "case.json").read_text())
        (folder / "config.json").write_text(json.dumps(self.info["draft_config"]))
        shutil.copy(source / "weights.safetensors", folder / "model.safetensors")
        self.drafter = load_drafter(folder, dtype=torch.float32)
        tensors = load_file(source / "batch.safetensors")
        self.batch = FeatureBatch.from_tensors(*(tensors[key] for key in BATCH_KEYS))
        self.expect = load_file(source / "expect.safetensors")
        self.anchors = (self.expect["anchor_positions"], self.expect["block_keep_mask"])

    def run(self, **options):
        return self.drafter.training_forward(self.batch, anchors=self.anchors, **self.info["loss_args"], **options)


CASES = [
    "dspark_qwen3_vanilla",
    "dspark_qwen3_gated",
    "dspark_qwen3_rnn",
    "dspark_gemma4_vanilla",
    "dspark_gemma4_softcap",
    "dflash_qwen3",
    "dflash_gemma4",
]


@pytest.fixture(params=CASES)
def case(request, tmp_path):
    return Case(request.param, tmp_path)


def distance(ours, theirs):
    return ((ours.float() - theirs.float()).norm() / theirs.float().norm()).item()


def test_checkpoint_loads_as_the_algorithm_and_family_that_wrote_it(case):
    assert case.drafter.algorithm == case.info["algorithm"]
    assert case.drafter.family.name == case.info["family"]


def test_rows_that_are_not_needed_may_hold_anything(case):
    needed = case.drafter.needed_rows(case.batch.loss_mask)
    assert not needed.all()
    last = case.batch.target_last_hidden_states.masked_fill(~needed[..., None], torch.nan)
    batch = dataclasses.replace(case.batch, target_last_hidden_states=last)
    out = case.drafter.training_forward(batch, anchors=case.anchors, **case.info["loss_args"])
    assert out.loss.item() == pytest.approx(case.info["loss"], rel=TOLERANCE)


def test_slots_equal_the_reference(case):
    out = case.run(return_logits=True)
    assert torch.equal(out.target_ids, case.expect["target_ids"])
    assert torch.equal(out.eval_mask, case.expect["eval_mask"])


@pytest.mark.parametrize("name", ["draft_logits", "confidence_pred", "aligned_target_logits"])
def test_outputs_equal_the_reference(case, name):
    counts = case.expect["eval_mask"]
    ours = getattr(case.run(return_logits=True), name)
    if name not in case.expect:
        assert ours is None, "the reference has no such head"
        return
    assert ours.shape == case.expect[name].shape
    assert distance(ours[counts], case.expect[name][counts]) < TOLERANCE


@pytest.mark.parametrize("return_logits", [False, True])
def test_loss_and_metrics_equal_the_reference(case, return_logits):
    out = case.run(return_logits=return_logits)
    assert out.loss.item() == pytest.approx(case.info["loss"], rel=TOLERANCE)
    assert out.metrics.keys() == case.info["metrics"].keys()
    assert out.metrics == pytest.approx(case.info["metrics"], rel=TOLERANCE)


@pytest.mark.parametrize("return_logits", [False, True])
def test_every_gradient_equals_the_reference(case, return_logits):
    case.run(return_logits=return_logits).loss.backward()
    ours = {f"grad.{name}": weight.grad for name, weight in case.drafter.named_parameters() if weight.requires_grad}
    theirs = {name: gradient for name, gradient in case.expect.items() if name.startswith("grad.")}
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert distance(ours[name], gradient) < TOLERANCE, name


def test_frozen_copies_get_no_gradient(case):
    case.run().loss.backward()
    assert case.drafter.embed_tokens.weight.grad is None
    assert case.drafter.lm_head.weight.grad is None


def test_loss_settings_come_from_the_defaults_where_the_checkpoint_has_none(case):
    out = case.drafter.training_forward(case.batch, anchors=case.anchors)
    assert out.loss.item() == pytest.approx(case.info["loss"], rel=TOLERANCE)
