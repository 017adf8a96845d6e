import pytest
import torch
from pydantic import ValidationError
from transformers import GPT2Config, Qwen3Config

from drafters import build_drafter


def test_new_weights_are_normal_with_zero_biases_and_unit_norms(target_config):
    torch.manual_seed(0)
    target_config.initializer_range = 0.1
    drafter = build_drafter(target_config, target_layer_ids=[0, 2, 4], mask_token_id=1, num_draft_layers=2)
    for name, weight in drafter.named_parameters():
        if "norm" in name:
            assert weight.unique().tolist() == [1.0], name
        elif name.endswith("bias"):
            assert weight.unique().tolist() == [0.0], name
        else:
            assert weight.mean().abs() < 0.03, name
            assert 0.07 < weight.std() < 0.13, name


def test_settings_left_out_are_resolved_for_the_target():
    config = Qwen3Config(
        vocab_size=151670, hidden_size=4, intermediate_size=4, num_hidden_layers=36, num_attention_heads=1,
        num_key_value_heads=1, head_dim=4,
    )  # fmt: skip
    drafter = build_drafter(config, algorithm="dspark", num_draft_layers=1, markov_rank=2)
    assert drafter.settings.target_layer_ids == (1, 9, 17, 25, 33)
    assert drafter.settings.mask_token_id == 151669
    assert drafter.fc.weight.shape == (4, 20)
    assert drafter.training


def test_target_config_is_left_as_it_was(target_config):
    before = target_config.to_dict()
    build_drafter(target_config, target_layer_ids=[0, 2, 4], mask_token_id=1, num_draft_layers=2)
    assert target_config.to_dict() == before


def test_unknown_algorithm_is_refused_with_the_known_ones(target_config):
    with pytest.raises(ValueError, match="algorithm") as caught:
        build_drafter(target_config, algorithm="medusa")
    assert all(name in str(caught.value) for name in ("medusa", "dspark", "dflash", "eagle3"))


def test_target_that_is_no_llama_like_decoder_is_refused():
    with pytest.raises(ValueError, match=r"'gpt2'.*no number for .*rms_norm_eps"):
        build_drafter(GPT2Config(n_layer=8), mask_token_id=1)


def test_unknown_setting_is_refused_by_name(target_config):
    with pytest.raises(ValidationError, match="blok_size"):
        build_drafter(target_config, blok_size=3)
