"""Eagle3 against the reference toolkit's numbers; see tests/golden/README.md."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from drafters import FeatureBatch, load_drafter, save_drafter

GOLDEN = Path(__file__).parents[2] / "golden"
TOLERANCE = 1e-4
BATCH_KEYS = ("input_ids", "loss_mask", "attention_mask", "target_hidden_states", "target_last_hidden_states")
PATHS = ["fused", "plain", "logits"]


class Case:
    def __init__(self, name, folder):
        source = GOLDEN / name
        self.info = json.loads((source / "case.json").read_text())
        self.folder = folder
        (folder / "config.json").write_text(json.dumps(self.info["draft_config"]))
        shutil.copy(source / "weights.safetensors", folder / "model.safetensors")
        self.drafter = load_drafter(folder, dtype=torch.float32)
        tensors = load_file(source / "batch.safetensors")
        self.batch = FeatureBatch.from_tensors(*(tensors[key] for key in BATCH_KEYS))
        self.expect = load_file(source / "expect.safetensors")

    def run(self, path, batch=None):
        self.drafter.settings = self.drafter.settings.model_copy(
            update={"loss": "plain" if path == "plain" else "fused"}
        )
        self.drafter.zero_grad(set_to_none=True)
        return self.drafter.training_forward(batch or self.batch, return_logits=path == "logits")

    def gradients(self):
        return {f"grad.{name}": weight.grad for name, weight in self.drafter.named_parameters() if weight.requires_grad}


@pytest.fixture(params=["eagle3_qwen3", "eagle3_gemma4", "eagle3_gemma4_softcap"])
def case(request, tmp_path):
    return Case(request.param, tmp_path)


def distance(ours, theirs):
    return ((ours.float() - theirs.float()).norm() / theirs.float().norm()).item()


def test_logits_equal_the_reference(case):
    ours, theirs = case.run("logits").draft_logits, case.expect["draft_logits"]
    assert ours.shape == theirs.shape
    num_tokens = case.batch.attention_mask.sum(-1, keepdim=True)
    places = torch.arange(ours.shape[2])
    for step in range(len(ours)):
        live = places < num_tokens - (step + 1)
        assert distance(ours[step][live], theirs[step][live]) < TOLERANCE


@pytest.mark.parametrize("path", PATHS)
def test_loss_and_metrics_equal_the_reference(case, path):
    out = case.run(path)
    assert out.loss.item() == pytest.approx(case.info["loss"], rel=TOLERANCE)
    assert out.metrics.keys() == case.info["metrics"].keys()
    assert out.metrics == pytest.approx(case.info["metrics"], rel=TOLERANCE)


@pytest.mark.parametrize("path", PATHS)
def test_every_gradient_equals_the_reference(case, path):
    case.run(path).loss.backward()
    ours = case.gradients()
    theirs = {name: gradient for name, gradient in case.expect.items() if name.startswith("grad.")}
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert distance(ours[name], gradient) < TOLERANCE, name


@pytest.mark.parametrize("path", PATHS)
def test_only_needed_rows_of_the_last_hidden_state_are_read(case, path):
    expected = case.run(path)
    expected.loss.backward()
    expected_gradients = {name: gradient.clone() for name, gradient in case.gradients().items()}
    needed = case.drafter.needed_rows(case.batch.loss_mask)
    assert 0 < needed.sum() < needed.numel()
    last = torch.where(needed[..., None], case.batch.target_last_hidden_states, torch.nan)
    out = case.run(path, dataclasses.replace(case.batch, target_last_hidden_states=last))
    out.loss.backward()
    assert torch.equal(out.loss, expected.loss)
    assert out.metrics == expected.metrics
    for name, gradient in case.gradients().items():
        assert torch.equal(gradient, expected_gradients[name]), name


def test_checkpoint_is_written_as_it_was_read(case, tmp_path):
    save_drafter(case.drafter, tmp_path / "again")
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "again", case.folder))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    written = json.loads((tmp_path / "again" / "config.json").read_text())
    keys = ["architectures", "model_type", "num_hidden_layers", "layer_types", "tie_word_embeddings"]
    keys += ["num_target_layers", "target_layer_ids", "ttt_length", "step_loss_decay", "draft_num_hidden_layers"]
    assert {key: written[key] for key in keys} == {key: case.info["draft_config"][key] for key in keys}
    assert "target_model_name_or_path" in written
    assert load_drafter(tmp_path / "again").settings == case.drafter.settings
