"""Where layers are found in models of every family, and that what is taken is what transformers reports."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma4Config,
    Gemma4TextConfig,
    Gemma4UnifiedConfig,
    Gemma4UnifiedTextConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3MoeConfig,
)

from services.target.config import TargetConfig
from services.target.engine import TransformersEngine
from services.target.request import CaptureInputs
from services.target.tap import FeatureTap, decoder_of

WIDTH, VOCAB = 16, 50
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}
GEMMA = {"head_dim": 8, "global_head_dim": 12, "hidden_size_per_layer_input": 0, "sliding_window": 3}
EDGE = {"hidden_size_per_layer_input": 4, "vocab_size_per_layer_input": VOCAB, "num_kv_shared_layers": 2}
PATTERN = {"layer_types": ["sliding_attention", "full_attention"] * 2}

MODELS: dict[str, PretrainedConfig] = {
    "gemma4_text": Gemma4TextConfig(**SIZES, **GEMMA, **PATTERN),
    "gemma4_edge": Gemma4TextConfig(**SIZES, **(GEMMA | EDGE), **PATTERN),
    "gemma4": Gemma4Config(text_config=Gemma4TextConfig(**SIZES, **GEMMA, **PATTERN).to_dict()),
    "gemma4_unified": Gemma4UnifiedConfig(
        text_config=Gemma4UnifiedTextConfig(
            **SIZES, head_dim=8, global_head_dim=12, sliding_window=3, **PATTERN
        ).to_dict()
    ),
    "llama": LlamaConfig(**SIZES),
    "mistral": MistralConfig(**SIZES, sliding_window=3),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3_moe": Qwen3MoeConfig(**SIZES, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8),
}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = AutoModelForCausalLM.from_config(MODELS[name]).eval()
    return model


@pytest.mark.parametrize("name", MODELS)
def test_decoder_is_what_has_layers_embedding_and_norm(name: str) -> None:
    decoder = decoder_of(build(name))
    assert decoder_of(decoder) is decoder
    assert len(decoder.get_submodule("layers")) == 4  # type: ignore[arg-type]
    assert decoder.get_submodule("embed_tokens").weight.shape == (VOCAB, WIDTH)  # type: ignore[union-attr]
    assert decoder.get_submodule("norm") is not None


def test_multimodal_wrapper_is_looked_through() -> None:
    model = build("gemma4")
    assert type(model).__name__ == "Gemma4ForConditionalGeneration"
    assert decoder_of(model) is model.get_submodule("model.language_model")


def test_model_without_decoder_stack_is_refused() -> None:
    with pytest.raises(ValueError, match="Linear has no decoder stack"):
        decoder_of(nn.Linear(1, 1))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("through", ["model", "decoder"])
def test_taken_outputs_equal_output_hidden_states(name: str, through: str) -> None:
    """Entry 0 of transformers' hidden states is the embedding (scaled in Gemma), entry i + 1 layer i."""
    model = build(name)
    caller = model if through == "model" else decoder_of(model)
    ids = torch.randint(2, VOCAB, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        with FeatureTap(model, (2, -1, 0)) as tap:
            caller(input_ids=ids)
            taken = tap.take()
        hidden = model(input_ids=ids, output_hidden_states=True).hidden_states
    for layer_id, output in zip((2, -1, 0), taken, strict=True):
        assert output.shape == (2, 9, WIDTH)
        torch.testing.assert_close(output, hidden[layer_id + 1])


@pytest.mark.parametrize("name", ["gemma4_edge", "gemma4", "gemma4_unified", "llama", "qwen3_moe"])
def test_engine_captures_every_family(name: str, tmp_path: Path) -> None:
    model = build(name)
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    engine = TransformersEngine(TargetConfig(model=str(tmp_path), dtype="float32", num_gpus=0))
    description = engine.describe()
    assert (description.num_layers, description.hidden_size, description.vocab_size) == (4, WIDTH, VOCAB)
    inputs = [
        CaptureInputs(input_ids=tuple(range(2, 2 + length)), layer_ids=(-1, 0, 2), last_rows=(1, 3), dtype="fp32")
        for length in (9, 5)
    ]
    captured = engine.capture(inputs)
    for sample, features in zip(inputs, captured, strict=True):
        with torch.inference_mode():
            hidden = model(input_ids=torch.tensor([sample.input_ids]), output_hidden_states=True).hidden_states
        context = torch.cat([hidden[0][0], hidden[1][0], hidden[3][0]], dim=-1)
        torch.testing.assert_close(features.context, context, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(features.last, hidden[-1][0][[1, 3]], rtol=1e-4, atol=1e-4)
