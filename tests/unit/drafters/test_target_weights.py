"""What a drafter takes from its target's safetensors."""

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    Gemma4Config,
    Gemma4TextConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
)

from drafters import build_drafter, copy_target_embeddings, copy_target_layers
from drafters.target_weights import TargetWeightsError


def write_target(folder, tensors, **config):
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("prefix", ["model.", "model.language_model."])
def test_embedding_and_head_are_copied_from_the_target(make_drafter, tmp_path, prefix):
    drafter = make_drafter()
    embedding, head = torch.randn(23, 16), torch.randn(23, 16)
    write_target(
        tmp_path,
        {f"{prefix}embed_tokens.weight": embedding, "lm_head.weight": head},
        tie_word_embeddings=False,
    )
    copy_target_embeddings(drafter, tmp_path)
    assert torch.equal(drafter.embed_tokens.weight, embedding)
    assert torch.equal(drafter.lm_head.weight, head)
    assert not drafter.lm_head.weight.requires_grad


def test_tied_target_gives_its_embedding_twice(make_drafter, tmp_path):
    drafter, embedding = make_drafter(), torch.randn(23, 16)
    write_target(tmp_path, {"model.embed_tokens.weight": embedding}, tie_word_embeddings=True)
    copy_target_embeddings(drafter, tmp_path)
    assert torch.equal(drafter.lm_head.weight, embedding)
    assert drafter.lm_head.weight.data_ptr() != drafter.embed_tokens.weight.data_ptr()


def test_embeddings_in_several_files_are_found(make_drafter, tmp_path):
    drafter = make_drafter()
    (tmp_path / "config.json").write_text(json.dumps({"tie_word_embeddings": False}))
    save_file({"model.embed_tokens.weight": torch.ones(23, 16)}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"lm_head.weight": torch.full((23, 16), 2.0)}, tmp_path / "model-00002-of-00002.safetensors")
    copy_target_embeddings(drafter, tmp_path)
    assert drafter.embed_tokens.weight.unique().tolist() == [1.0]
    assert drafter.lm_head.weight.unique().tolist() == [2.0]


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"other": torch.zeros(1)}, r"one tensor named embed_tokens\.weight, it has: none"),
        ({"model.embed_tokens.weight": torch.zeros(23, 16)}, r"no lm_head\.weight, though"),
        (
            {"model.embed_tokens.weight": torch.zeros(24, 16), "lm_head.weight": torch.zeros(23, 16)},
            r"embed_tokens\.weight is \[24, 16\], but the drafter's is \[23, 16\]",
        ),
    ],
)
def test_target_without_fitting_embeddings_is_refused(make_drafter, tmp_path, tensors, message):
    write_target(tmp_path, tensors, tie_word_embeddings=False)
    with pytest.raises(TargetWeightsError, match=message):
        copy_target_embeddings(make_drafter(), tmp_path)


def test_target_without_safetensors_is_refused(make_drafter, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(TargetWeightsError, match=r"has no \*\.safetensors"):
        copy_target_embeddings(make_drafter(), tmp_path)


def test_target_layers_become_the_draft_layers_and_the_deepest_features_the_context(
    make_drafter, target_config, tmp_path
):
    target = Qwen3ForCausalLM(target_config)
    for parameter in target.parameters():
        torch.nn.init.normal_(parameter)
    target.save_pretrained(tmp_path)
    drafter = make_drafter()
    copy_target_layers(drafter, tmp_path, (1, 5))
    for own, source in zip(drafter.layers, (target.model.layers[1], target.model.layers[5]), strict=True):
        for name, parameter in own.named_parameters():
            assert torch.equal(parameter, source.get_parameter(name)), name
    features = torch.randn(4, drafter.fc.in_features)
    features[:, :-16] = 0
    assert torch.equal(drafter.fc(features), features[:, -16:])
    assert torch.equal(drafter.hidden_norm.weight, target.model.layers[5].input_layernorm.weight)
    assert torch.equal(drafter.norm.weight, target.model.norm.weight)


def test_layer_that_the_target_does_not_have_is_named(make_drafter, target_config, tmp_path):
    Qwen3ForCausalLM(target_config).save_pretrained(tmp_path)
    with pytest.raises(TargetWeightsError, match=r"no tensor named model\.layers\.6\."):
        copy_target_layers(make_drafter(), tmp_path, (1, 6))


@pytest.mark.parametrize("layers", [(1,), (0, 6), (-1, 2)])
def test_warm_start_layers_must_be_one_of_the_targets_for_each_draft_layer(target_config, layers):
    with pytest.raises(ValueError, match="warm_start_layers"):
        build_drafter(
            target_config,
            num_draft_layers=2,
            target_layer_ids=(0, 2, 4),
            mask_token_id=3,
            warm_start_layers=layers,
        )


SIZES = {
    "vocab_size": 29,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
GEMMA = Gemma4TextConfig(
    **SIZES,
    head_dim=4,
    global_head_dim=8,
    hidden_size_per_layer_input=4,
    vocab_size_per_layer_input=29,
    layer_types=["sliding_attention", "full_attention"] * 3,
)
TARGETS = {
    "gemma4_text": GEMMA,
    "gemma4": Gemma4Config(
        text_config=GEMMA.to_dict(),
        vision_config={"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
                       "head_dim": 8, "intermediate_size": 24, "position_embedding_size": 8, "pooling_kernel_size": 1},
    ),
    "llama": LlamaConfig(**SIZES, attention_bias=True),
    "mistral": MistralConfig(**SIZES),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3_moe": Qwen3MoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8),
}  # fmt: skip


def save_target(name, folder):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(TARGETS[name])
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)
    return model


def small_drafter(name):
    return build_drafter(TARGETS[name], num_draft_layers=2, target_layer_ids=(0, 2), mask_token_id=1, markov_rank=2)


@pytest.mark.parametrize("name", TARGETS)
def test_embedding_and_head_of_every_family_are_copied(tmp_path, name):
    """Gemma's table is copied as it is stored, and scaled when it is read: tokens embed as in the target."""
    model, drafter = save_target(name, tmp_path), small_drafter(name)
    copy_target_embeddings(drafter, tmp_path)
    ids = torch.tensor([[2, 3, 28]])
    torch.testing.assert_close(drafter.embed_tokens(ids), model.get_input_embeddings()(ids))
    assert torch.equal(drafter.lm_head.weight, model.get_output_embeddings().weight)


@pytest.mark.parametrize("name", ["gemma4_text", "gemma4", "llama", "mistral", "qwen2"])
def test_layers_of_every_family_start_drafters(tmp_path, name):
    """The vision tower of the multimodal target has layers of the same names and width: they are not what is meant."""
    model, drafter = save_target(name, tmp_path), small_drafter(name)
    copy_target_layers(drafter, tmp_path, (1, 5))
    decoder = model.model.language_model if name == "gemma4" else model.model
    for own, source in zip(drafter.layers, (decoder.layers[1], decoder.layers[5]), strict=True):
        for parameter_name, parameter in own.named_parameters():
            assert torch.equal(parameter, source.get_parameter(parameter_name)), parameter_name
    assert torch.equal(drafter.hidden_norm.weight, decoder.layers[5].input_layernorm.weight)
    assert torch.equal(drafter.norm.weight, decoder.norm.weight)


def test_sliding_layer_of_gemma_starts_no_drafter(tmp_path):
    save_target("gemma4_text", tmp_path)
    with pytest.raises(TargetWeightsError, match=r"target layer 2 is no full-attention layer.*\[1, 3, 5\]"):
        copy_target_layers(small_drafter("gemma4_text"), tmp_path, (1, 2))


def test_layers_with_experts_start_no_drafter(tmp_path):
    save_target("qwen3_moe", tmp_path)
    with pytest.raises(TargetWeightsError, match="layers of qwen3_moe are not those of its dense drafter"):
        copy_target_layers(small_drafter("qwen3_moe"), tmp_path, (1, 2))


def test_layers_of_a_target_that_is_not_known_start_no_drafter(tmp_path):
    """They may have the same tensors and compute something else, as Gemma-2's norms do."""
    save_target("mistral", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "gemma2"}))
    with pytest.raises(TargetWeightsError, match="layers of gemma2 are not those of its llama drafter"):
        copy_target_layers(small_drafter("mistral"), tmp_path, (1, 2))


def test_head_with_a_bias_is_refused(make_drafter, tmp_path):
    tensors = {"model.embed_tokens.weight": torch.ones(23, 16), "lm_head.weight": torch.ones(23, 16)}
    write_target(tmp_path, tensors | {"lm_head.bias": torch.ones(23)}, tie_word_embeddings=False)
    with pytest.raises(TargetWeightsError, match=r"its head has a bias, lm_head\.bias"):
        copy_target_embeddings(make_drafter(), tmp_path)
