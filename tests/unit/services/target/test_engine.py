"""The transformers engine on a tiny random Qwen3, against the model's own output_hidden_states."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from services.errors import TargetError
from services.models import read_shape
from services.target.config import TargetConfig
from services.target.engine import TransformersEngine
from services.target.request import CaptureInputs

LAYERS, WIDTH, VOCAB = 4, 16, 50
LENGTHS = (7, 3, 5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3 with weights stored in bf16."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        initializer_range=0.3,
    )
    path = tmp_path_factory.mktemp("qwen3")
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    return path


def _config(folder: Path, **changes: object) -> TargetConfig:
    return TargetConfig(model=str(folder), **{"dtype": "float32", "num_gpus": 0, **changes})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def engine(folder: Path) -> TransformersEngine:
    return TransformersEngine(_config(folder))


def _inputs(length: int, layer_ids: tuple[int, ...] = (2, -1, 0), **changes: object) -> CaptureInputs:
    generator = torch.Generator().manual_seed(length)
    fields: dict[str, object] = {
        "input_ids": tuple(torch.randint(VOCAB, (length,), generator=generator).tolist()),
        "layer_ids": layer_ids,
        "last_rows": tuple(range(0, length, 2)),
        "dtype": "fp32",
    }
    return CaptureInputs(**{**fields, **changes})  # type: ignore[arg-type]


def _reference(folder: Path, inputs: CaptureInputs) -> tuple[Tensor, Tensor]:
    """Context and last rows by output_hidden_states: entry 0 is the embedding, entry i + 1 layer i, the last normed."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        hidden = model(torch.tensor([inputs.input_ids]), output_hidden_states=True).hidden_states
    context = torch.cat([hidden[layer_id + 1][0] for layer_id in inputs.layer_ids], dim=-1)
    return context, hidden[-1][0][list(inputs.last_rows)]


def test_capture_equals_output_hidden_states(folder: Path, engine: TransformersEngine) -> None:
    inputs = _inputs(7)
    (features,) = engine.capture([inputs])
    context, last = _reference(folder, inputs)
    assert features.context.shape == (7, 3 * WIDTH)
    assert features.last.shape == (4, WIDTH)
    assert features.context.dtype == torch.float32
    assert context.abs().max() > 0.1  # a comparison of zeros would prove nothing
    torch.testing.assert_close(features.context, context, rtol=0, atol=1e-5)
    torch.testing.assert_close(features.last, last, rtol=0, atol=1e-5)


def test_padded_batch_equals_single_forwards(engine: TransformersEngine) -> None:
    batch = [_inputs(length) for length in LENGTHS]
    together = engine.capture(batch)
    for inputs, features in zip(batch, together, strict=True):
        (alone,) = engine.capture([inputs])
        assert features.context.shape == (inputs.num_tokens, 3 * WIDTH)
        torch.testing.assert_close(features.context, alone.context, rtol=0, atol=1e-5)
        torch.testing.assert_close(features.last, alone.last, rtol=0, atol=1e-5)


def test_each_sample_has_its_own_wire_dtype_and_rows(engine: TransformersEngine) -> None:
    batch = [_inputs(5, dtype="bf16"), _inputs(5, dtype="fp16", last_rows=()), _inputs(5)]
    bf16, fp16, fp32 = engine.capture(batch)
    assert [features.context.dtype for features in (bf16, fp16, fp32)] == [
        torch.bfloat16,
        torch.float16,
        torch.float32,
    ]
    assert fp16.last.shape == (0, WIDTH)
    assert torch.equal(bf16.context, fp32.context.to(torch.bfloat16))
    assert torch.equal(bf16.last, fp32.last.to(torch.bfloat16))
    assert bf16.context.is_contiguous()
    assert bf16.last.is_contiguous()


def test_hooks_only_on_wanted_layers_and_gone_afterwards(engine: TransformersEngine) -> None:
    engine.capture([_inputs(3, (1,))])
    assert not any(module._forward_hooks for module in engine._decoder.modules())


def test_the_head_is_not_kept(engine: TransformersEngine) -> None:
    assert not any("lm_head" in name for name, _ in engine._decoder.named_modules())


def test_bf16_weights_compute_in_float32(engine: TransformersEngine) -> None:
    assert {parameter.dtype for parameter in engine._decoder.parameters()} == {torch.float32}
    (features,) = engine.capture([_inputs(5)])
    assert not torch.equal(features.context, features.context.to(torch.bfloat16).to(torch.float32))


def test_describe_reads_the_models_shape(folder: Path, engine: TransformersEngine) -> None:
    description = engine.describe()
    assert description.fingerprint == read_shape(folder).fingerprint
    assert (description.num_layers, description.hidden_size, description.vocab_size) == (LAYERS, WIDTH, VOCAB)
    assert (description.dtype, description.engine, description.model_name) == ("float32", "transformers", str(folder))
    assert description.max_tokens == 64


def test_describe_max_tokens_is_bounded_by_the_batch_budget(folder: Path) -> None:
    assert TransformersEngine(_config(folder, max_batch_tokens=20)).describe().max_tokens == 20


def test_capture_refuses_mixed_layers(engine: TransformersEngine) -> None:
    with pytest.raises(ValueError, match="must share their layer ids"):
        engine.capture([_inputs(3, (0,)), _inputs(3, (1,))])


def test_load_refuses_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="neither a folder here nor a model the hub gives"):
        TransformersEngine(_config(tmp_path / "nothing"))


def _copy(folder: Path, to: Path) -> None:
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())


def test_load_refuses_missing_weights(folder: Path, tmp_path: Path) -> None:
    _copy(folder, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.2.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TargetError, match=r"lacks 1 weights .* model.layers.2.mlp.up_proj.weight first"):
        TransformersEngine(_config(tmp_path))


def test_load_refuses_a_cut_weights_file(folder: Path, tmp_path: Path) -> None:
    _copy(folder, tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(TargetError, match="cannot be loaded"):
        TransformersEngine(_config(tmp_path))


def test_load_refuses_an_unknown_architecture(tmp_path: Path) -> None:
    config = {
        "model_type": "no-such-model",
        "num_hidden_layers": 2,
        "hidden_size": 4,
        "vocab_size": 8,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(TargetError, match="cannot be loaded: ValueError"):
        TransformersEngine(_config(tmp_path))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_that_is_not_there_is_refused(folder: Path) -> None:
    with pytest.raises(TargetError, match=r"target.num_gpus is 0.5, but torch .* finds no GPU"):
        TransformersEngine(_config(folder, num_gpus=0.5))
