"""What a drafter takes from its target's safetensors."""

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import Qwen3ForCausalLM

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
