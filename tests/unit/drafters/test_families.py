"""What families read from targets' configs, and their layers against transformers' own."""

from __future__ import annotations

import pytest
import torch
from one_sequence import OneSequence
from torch.nn import functional
from transformers import (
    AutoConfig,
    DeepseekV3Config,
    Gemma4Config,
    Gemma4TextConfig,
    Gemma4UnifiedTextConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)
from transformers.models.gemma4.modeling_gemma4 import Gemma4TextModel
from transformers.models.llama.modeling_llama import LlamaModel
from transformers.models.qwen2.modeling_qwen2 import Qwen2Model
from transformers.models.qwen3.modeling_qwen3 import Qwen3Model

from drafters import FeatureBatch, build_drafter
from drafters.families.layer import Rope
from drafters.registry import find_family

SIZES = {
    "vocab_size": 29,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
LATENT = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 8,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 6,
    "qk_nope_head_dim": 4,
    "v_head_dim": 5,
    "first_k_dense_replace": 1,
}
GEMMA = {
    "head_dim": 4,
    "global_head_dim": 8,
    "num_global_key_value_heads": 1,
    "attention_k_eq_v": True,
    "hidden_size_per_layer_input": 0,
    "final_logit_softcapping": 5.0,
}

TARGETS = {
    "qwen3": Qwen3Config(**SIZES, head_dim=8),
    "qwen3_moe": Qwen3MoeConfig(**SIZES, head_dim=8, **EXPERTS),
    "gemma4_text": Gemma4TextConfig(**SIZES, **GEMMA),
    "gemma4_unified_text": Gemma4UnifiedTextConfig(**SIZES, **(GEMMA | {"attention_k_eq_v": False})),
    "qwen2": Qwen2Config(**SIZES),
    "llama": LlamaConfig(**SIZES, attention_bias=True),
    "mistral": MistralConfig(**SIZES, head_dim=8, sliding_window=4),
    "deepseek_v3": DeepseekV3Config(**(SIZES | {"num_key_value_heads": 4}), **LATENT),
}


def make_drafter(target, algorithm="dspark", **settings):
    torch.manual_seed(3)
    defaults = {"num_draft_layers": 2, "block_size": 4, "target_layer_ids": (0, 2, 4), "mask_token_id": 1}
    heads = {"markov_rank": 3} if algorithm == "dspark" else {}
    return build_drafter(target, algorithm, **(defaults | heads | settings))


def make_batch(length=14, num_layers=3):
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(2, SIZES["vocab_size"], (2, length), generator=generator)
    supervised = (torch.arange(length) >= 4).long().expand(2, -1)
    context = torch.randn(2, length, num_layers * SIZES["hidden_size"], generator=generator)
    return FeatureBatch.from_tensors(
        ids, supervised, None, context, torch.randn(2, length, SIZES["hidden_size"], generator=generator)
    )


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("algorithm", ["dspark", "dflash"])
def test_every_target_gets_a_drafter_of_its_width_heads_and_vocabulary_that_learns(name, algorithm):
    target = TARGETS[name]
    drafter = make_drafter(target, algorithm)
    assert drafter.embed_tokens.weight.shape == (29, 16)
    assert drafter.lm_head.weight.shape == (29, 16)
    assert drafter.layers[0].mlp.down_proj.weight.shape == (16, 24)
    attention = drafter.layers[0].self_attn
    assert attention.q_proj.out_features == 4 * attention.head_dim
    drafter.training_forward(make_batch(), anchor_seeds=[1, 2]).loss.backward()
    assert idle_weights(drafter) == []


@pytest.mark.parametrize("name", TARGETS)
def test_every_target_gets_an_eagle3_drafter_that_learns(name):
    torch.manual_seed(3)
    drafter = build_drafter(TARGETS[name], "eagle3", target_layer_ids=range(5), ttt_length=3)
    attention = drafter.layers[0].self_attn
    assert attention.q_proj.in_features == 2 * 16
    assert attention.o_proj.out_features == 16
    drafter.training_forward(make_batch(num_layers=5)).loss.backward()
    assert idle_weights(drafter) == []


def idle_weights(drafter):
    trained = [(name, weight.grad) for name, weight in drafter.named_parameters() if weight.requires_grad]
    return [name for name, gradient in trained if gradient is None or not gradient.abs().max()]


@pytest.mark.parametrize(
    ("name", "head_size", "key_heads"),
    [
        ("qwen3_moe", 8, 2),
        ("gemma4_text", 8, 1),
        ("gemma4_unified_text", 8, 2),  # without attention_k_eq_v the ordinary number of key heads counts
        ("qwen2", 4, 2),
        ("mistral", 8, 2),
        ("deepseek_v3", 6, 4),  # the rotated part of a latent head
    ],
)
def test_heads_are_the_targets(name, head_size, key_heads):
    attention = make_drafter(TARGETS[name]).layers[0].self_attn
    assert attention.head_dim == head_size
    assert attention.k_proj.out_features == key_heads * head_size
    assert attention.o_proj.in_features == 4 * head_size


def test_tensors_of_a_layer_are_the_familys():
    names = {name: set(dict(make_drafter(TARGETS[name]).layers[0].state_dict())) for name in TARGETS}
    projections = {f"self_attn.{part}_proj.weight" for part in "qkvo"}
    mlp = {f"mlp.{part}_proj.weight" for part in ("gate", "up", "down")}
    norms = {"input_layernorm.weight", "post_attention_layernorm.weight"}
    head_norms = {"self_attn.q_norm.weight", "self_attn.k_norm.weight"}
    gemma = {"pre_feedforward_layernorm.weight", "post_feedforward_layernorm.weight", "layer_scalar"} | head_norms
    plain = projections | mlp | norms
    assert names["mistral"] == names["deepseek_v3"] == plain
    assert names["qwen3"] == names["qwen3_moe"] == plain | head_norms
    assert names["qwen2"] == plain | {f"self_attn.{part}_proj.bias" for part in "qkv"}
    assert names["llama"] == plain | {f"self_attn.{part}_proj.bias" for part in "qkvo"}
    assert names["gemma4_unified_text"] == plain | gemma
    assert names["gemma4_text"] == (plain | gemma) - {"self_attn.v_proj.weight"}


@pytest.mark.parametrize(
    ("name", "model_class"),
    [
        ("qwen3", Qwen3Model),
        ("qwen2", Qwen2Model),
        ("llama", LlamaModel),
        ("gemma4_text", Gemma4TextModel),
        ("gemma4_unified_text", Gemma4TextModel),
    ],
)
def test_layer_computes_what_transformers_layer_does(name, model_class):
    """With causal attention between its two halves, a draft layer is the target's last layer, a full-attention one."""
    target = TARGETS[name]
    if name == "gemma4_unified_text":
        target = Gemma4TextConfig(**SIZES, **(GEMMA | {"attention_k_eq_v": False}))
    torch.manual_seed(1)
    model = model_class(target).eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.4)
    family = find_family(target.model_type)
    config = make_drafter(target).config
    layer, rotary = family.layer(config, 0), family.rotary(config)
    layer.load_state_dict(model.layers[5].state_dict())

    kept = {}
    model.layers[5].register_forward_hook(lambda module, args, output: kept.update(inputs=args[0], output=output))
    model.layers[5].register_forward_pre_hook(lambda module, args: kept.update(before=args[0].clone()))
    with torch.no_grad():
        model(torch.randint(2, 29, (2, 9)))
        rows = layer.input_layernorm(kept["before"])
        rope = Rope(*rotary(rows, torch.arange(9)[None]))
        queries, (keys, values) = layer.self_attn.queries(rows, rope), layer.self_attn.keys_values(rows, rope)
        attended = functional.scaled_dot_product_attention(
            queries, keys, values, is_causal=True, scale=layer.self_attn.scaling, enable_gqa=True
        )
        ours = layer.finish(kept["before"], layer.self_attn.output(attended))
    torch.testing.assert_close(ours, kept["output"], rtol=1e-4, atol=1e-5)


def test_wider_attention_inputs_change_only_what_is_projected():
    for name in ("qwen3", "gemma4_text", "qwen2"):
        config = make_drafter(TARGETS[name]).config
        family = find_family(TARGETS[name].model_type)
        narrow, wide = family.layer(config, 0), family.layer(config, 0, attention_inputs=32)
        changed = {key for key, weight in wide.state_dict().items() if weight.shape != narrow.state_dict()[key].shape}
        assert changed == {
            key for key in narrow.state_dict() if key.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight"))
        }
        assert wide.self_attn.k_proj.in_features == 32
        assert narrow.state_dict().keys() == wide.state_dict().keys()


def test_gemma_embedding_is_scaled_by_the_root_of_the_width_in_the_weights_dtype():
    """D 48: √48 = 6.928…, which bf16 rounds to 6.9375."""
    target = Gemma4TextConfig(**(SIZES | GEMMA | {"hidden_size": 48}))
    drafter = make_drafter(target)
    ids = torch.tensor([[1, 5]])
    torch.testing.assert_close(drafter.embed_tokens(ids), drafter.embed_tokens.weight[ids] * 48**0.5)
    drafter = drafter.bfloat16()
    assert torch.equal(drafter.embed_tokens(ids), drafter.embed_tokens.weight[ids] * 6.9375)
    model = Gemma4TextModel(target).bfloat16()
    model.embed_tokens.weight.data.copy_(drafter.embed_tokens.weight)
    assert torch.equal(drafter.embed_tokens(ids), model.embed_tokens(ids))


def test_gemma_rope_rotates_the_first_part_of_each_half_head():
    """Head size 8, a quarter rotated: int(0.25·8 // 2) = 1 frequency θ^0 = 1, the other three are 0."""
    rotary = find_family("gemma4_text").rotary(make_drafter(TARGETS["gemma4_text"]).config)
    cos, sin = rotary(torch.zeros(1), torch.tensor([[3]]))
    assert cos[0, 0].tolist() == pytest.approx([torch.tensor(3.0).cos().item(), 1, 1, 1] * 2)
    assert sin[0, 0].tolist() == pytest.approx([torch.tensor(3.0).sin().item(), 0, 0, 0] * 2)


@pytest.mark.parametrize("name", ["qwen3", "llama", "gemma4_text"])
def test_rotary_frequencies_stay_float32_in_a_bf16_drafter(name):
    drafter = make_drafter(TARGETS[name]).bfloat16()
    assert {buffer.dtype for _, buffer in drafter.rotary.named_buffers()} == {torch.float32}
    assert drafter.training_forward(make_batch(), anchor_seeds=[1, 2]).loss.isfinite()


def test_softcap_bounds_draft_and_target_logits_alike():
    drafter = make_drafter(TARGETS["gemma4_text"], "dflash")
    drafter.lm_head.weight.data.mul_(1000)
    out = drafter.training_forward(make_batch(), anchor_seeds=[1, 2], return_logits=True)
    assert 4.9 < out.draft_logits.abs().max() <= 5.0
    assert 4.9 < out.aligned_target_logits.abs().max() <= 5.0
    assert drafter.head_logits(torch.full((16,), 0.0)).tolist() == [0.0] * 29


def test_text_config_inside_a_multimodal_one_is_what_counts():
    target = Gemma4Config(text_config=TARGETS["gemma4_text"].to_dict())
    drafter = make_drafter(target)
    assert drafter.family.name == "gemma4"
    assert drafter.config.target_model_type == "gemma4"
    assert drafter.config.target_text_model_type == "gemma4_text"
    assert drafter.config.num_target_layers == 6


def test_gemma_targets_with_experts_per_layer_inputs_and_shared_keys_get_plain_drafters():
    target = Gemma4TextConfig(
        **SIZES,
        **(GEMMA | {"hidden_size_per_layer_input": 4, "vocab_size_per_layer_input": 29}),
        num_kv_shared_layers=2,
        use_double_wide_mlp=True,
        enable_moe_block=True,
        num_experts=2,
        top_k_experts=1,
        moe_intermediate_size=8,
        layer_types=["sliding_attention", "full_attention"] * 3,
    )
    drafter = make_drafter(target)
    assert drafter.layers[0].state_dict().keys() == make_drafter(TARGETS["gemma4_text"]).layers[0].state_dict().keys()


def test_gemma_heads_are_read_from_either_shape_of_config():
    family = find_family("gemma4_text")
    base = make_drafter(TARGETS["gemma4_text"]).config.to_dict()
    older = {name: value for name, value in base.items() if name != "per_layer_config"}
    assert (older["global_head_dim"], older["num_global_key_value_heads"]) == (8, 1)
    newer = {
        name: value for name, value in base.items() if name not in ("global_head_dim", "num_global_key_value_heads")
    }
    newer["per_layer_config"] = {"5": {"head_dim": 8, "num_key_value_heads": 1}}  # the target's layer number
    for values in (base, older, newer):
        config = family.read_config(values)
        attention = family.layer(config, 1).self_attn
        assert (attention.head_dim, attention.k_proj.out_features) == (8, 8)
        assert (config.global_head_dim, config.num_global_key_value_heads) == (8, 1)


def test_gemma_config_whose_full_attention_layers_differ_is_refused():
    values = make_drafter(TARGETS["gemma4_text"]).config.to_dict()
    del values["global_head_dim"]
    values["per_layer_config"] = {"0": {"head_dim": 8}, "1": {"head_dim": 16}}
    with pytest.raises(ValueError, match="full-attention layers of per_layer_config differ"):
        find_family("gemma4_text").read_config(values)


def test_llama_scaling_of_rope_survives_and_partial_rotation_does_not():
    scaling = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 32}  # fmt: skip
    target = LlamaConfig(**SIZES, rope_parameters=scaling)
    assert make_drafter(target).config.rope_parameters == scaling
    partial = MistralConfig(
        **SIZES, rope_parameters={"rope_theta": 1e6, "rope_type": "default", "partial_rotary_factor": 0.5}
    )
    assert make_drafter(partial).config.rope_parameters == {"rope_theta": 1e6, "rope_type": "default"}


DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0, 1.0], "long_factor": [4.0, 4.0],
            "original_max_position_embeddings": 8}  # fmt: skip


@pytest.mark.parametrize("rope", [DYNAMIC, LONGROPE], ids=["dynamic", "longrope"])
def test_keys_do_not_depend_on_how_many_places_are_rotated_at_once(rope):
    """Twenty rows, past the eight that the target was trained on: all at once, and one by one."""
    target = LlamaConfig(**(SIZES | {"max_position_embeddings": 8}), rope_parameters=rope)
    drafter, features = make_drafter(target).eval(), torch.randn(20, 3 * SIZES["hidden_size"])
    keys = []
    for size in (20, 1):
        sequence = OneSequence(drafter)
        for rows in features.split(size):
            sequence.observe(rows, torch.zeros(len(rows)))
        keys.append(sequence.keys_values().keys)
    torch.testing.assert_close(*keys)
    assert drafter.config.rope_parameters == {"rope_type": "default", "rope_theta": 1e4}


def test_llama_layout_for_gemma_rotates_whole_heads_the_way_every_server_knows():
    drafter = build_drafter(TARGETS["gemma4_text"], "eagle3", layout="llama", target_layer_ids=(0, 2, 4))
    assert drafter.config.rope_parameters == {"rope_type": "default", "rope_theta": 1_000_000.0}


def test_generic_drafter_says_what_target_it_is_for():
    config = make_drafter(TARGETS["deepseek_v3"]).config
    assert (config.model_type, config.target_model_type) == ("llama", "deepseek_v3")
    assert "n_routed_experts" not in config.to_dict()


def test_target_that_scales_its_logits_is_refused():
    target = AutoConfig.for_model("granite", **SIZES, logits_scaling=4.0)
    with pytest.raises(ValueError, match=r"'granite' scales its logits \(logits_scaling 4.0\)"):
        make_drafter(target)
