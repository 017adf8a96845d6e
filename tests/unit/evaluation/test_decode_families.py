"""Speculative decoding with targets of every family: greedy output is the target's own, token for token."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Gemma4Config,
    Gemma4TextConfig,
    Gemma4UnifiedConfig,
    Gemma4UnifiedTextConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3MoeConfig,
)

from drafters import build_drafter
from evaluation import greedy_generate, speculative_generate

VOCAB = 31
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.5,  # greedy output then wanders instead of repeating one token
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
GEMMA = {
    "head_dim": 6,
    "global_head_dim": 12,
    "num_global_key_value_heads": 1,
    "attention_k_eq_v": True,
    "hidden_size_per_layer_input": 0,
    "final_logit_softcapping": 4.0,
    "sliding_window": 5,  # shorter than what is decoded
    "layer_types": ["sliding_attention", "full_attention"] * 3,
}
EDGE = {"hidden_size_per_layer_input": 4, "vocab_size_per_layer_input": VOCAB, "num_kv_shared_layers": 2}
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

UNIFIED = {name: value for name, value in GEMMA.items() if name != "hidden_size_per_layer_input"}

TARGETS = {
    "gemma4": Gemma4TextConfig(**SIZES, **GEMMA),
    "gemma4_unified": Gemma4UnifiedConfig(
        text_config=Gemma4UnifiedTextConfig(**SIZES, **UNIFIED).to_dict(), tie_word_embeddings=False
    ),
    "gemma4_edge": Gemma4TextConfig(**SIZES, **(GEMMA | EDGE)),
    "gemma4_multimodal": Gemma4Config(
        text_config=Gemma4TextConfig(**SIZES, **GEMMA).to_dict(), tie_word_embeddings=False
    ),
    "llama": LlamaConfig(**SIZES),
    "mistral": MistralConfig(**SIZES, sliding_window=5),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3_moe": Qwen3MoeConfig(**SIZES, head_dim=12, **EXPERTS),
    "deepseek_v3": DeepseekV3Config(**(SIZES | {"num_key_value_heads": 4}), **LATENT),
}


@pytest.fixture(scope="module", params=TARGETS)
def target(request):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(TARGETS[request.param]).eval()
    assert (request.param != "gemma4_multimodal") or type(model).__name__ == "Gemma4ForConditionalGeneration"
    return model


@pytest.fixture
def prompts():
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(2, VOCAB, (length,), generator=generator) for length in (9, 4, 1)]


@pytest.mark.parametrize("algorithm", ["dspark", "dflash", "masks_only"])
def test_greedy_output_is_the_targets_own(target, prompts, algorithm):
    torch.manual_seed(1)
    settings = {"num_draft_layers": 2, "block_size": 4, "target_layer_ids": (-1, 0, 3), "mask_token_id": 1}
    if algorithm == "dspark":
        drafter = build_drafter(target.config, algorithm, markov_rank=4, **settings)
    else:
        drafter = build_drafter(target.config, "dflash", sample_from_anchor=algorithm == "dflash", **settings)
    drafter.eval()
    output = speculative_generate(target, drafter, prompts, max_new_tokens=24)
    own = [greedy_generate(target, prompt, max_new_tokens=24) for prompt in prompts]
    assert output.output_ids == own
    assert len({token for tokens in own for token in tokens}) > 5
    assert {length for row in output.proposal_lengths for length in row} == {3 if algorithm == "masks_only" else 4}


def test_own_greedy_output_is_what_transformers_generates(target, prompts):
    """Without a cache: one forward pass over everything for each token."""
    for prompt in prompts:
        tokens = prompt.tolist()
        with torch.inference_mode():
            for _ in range(24):
                tokens.append(int(target(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
        assert greedy_generate(target, prompt, max_new_tokens=24) == tokens


def test_verified_features_are_those_of_one_pass_over_the_output(target, prompts):
    """What drafting observes, round by round with a cropped cache, is what training captures in a single pass."""
    torch.manual_seed(1)
    drafter = build_drafter(
        target.config, "dflash", num_draft_layers=1, block_size=4, target_layer_ids=(-1, 1, 4), mask_token_id=1
    ).eval()
    seen, observe = [], drafter.observe

    def keep(state, features, next_token_ids, counts, first):
        seen.append(features[0, : counts[0]].clone())
        observe(state, features, next_token_ids, counts, first)

    drafter.observe = keep
    output = speculative_generate(target, drafter, prompts[:1], max_new_tokens=24)
    ours = torch.cat(seen)
    with torch.inference_mode():
        tokens = torch.tensor([output.output_ids[0]])
        hidden = target(input_ids=tokens, output_hidden_states=True).hidden_states
    theirs = torch.cat([hidden[layer_id + 1][0] for layer_id in (-1, 1, 4)], dim=-1)
    length = min(len(ours), len(theirs))
    assert length >= len(prompts[0]) + 20
    torch.testing.assert_close(ours[:length], theirs[:length], rtol=1e-3, atol=1e-3)
