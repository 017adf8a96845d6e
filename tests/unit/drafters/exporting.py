"""Tiny drafters of each kind, to be exported: D 16, V 23, a target of eight layers."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Gemma4TextConfig, LlamaConfig, PretrainedConfig, Qwen2Config, Qwen3Config

from drafters import build_drafter
from drafters.drafter import Drafter
from drafters.export.cut import with_vocabulary

VOCAB, HIDDEN = 23, 16
KEPT = [1, 2, 5, 7, 22]
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 24,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
}
GEMMA: dict[str, Any] = {
    "global_head_dim": 8,
    "num_global_key_value_heads": 2,
    "attention_k_eq_v": True,
    "hidden_size_per_layer_input": 0,
    "final_logit_softcapping": 4.0,
    "layer_types": ["sliding_attention", "full_attention"] * 4,
    "pad_token_id": 0,
}
TARGETS: dict[str, PretrainedConfig] = {
    "qwen3": Qwen3Config(**SIZES),
    "qwen2": Qwen2Config(**{name: value for name, value in SIZES.items() if name != "head_dim"}),
    "llama": LlamaConfig(**SIZES),
    "biased": LlamaConfig(**SIZES, attention_bias=True),
    "gemma4": Gemma4TextConfig(**SIZES, **GEMMA),
    "gelu": Qwen3Config(**SIZES, hidden_act="gelu"),
}
BLOCK: dict[str, Any] = {"num_draft_layers": 2, "block_size": 4, "num_anchors": 6, "mask_token_id": VOCAB - 1}
KINDS: dict[str, dict[str, Any]] = {
    "dspark": BLOCK | {"markov_rank": 5},
    "dspark_bare": BLOCK | {"markov_rank": 5, "enable_confidence_head": False},
    "dspark_gated": BLOCK | {"markov_rank": 5, "markov_head_type": "gated"},
    "dspark_rnn": BLOCK | {"markov_rank": 5, "markov_head_type": "rnn", "confidence_head_with_markov": False},
    "dspark_no_markov": BLOCK | {"markov_rank": 0, "confidence_head_with_markov": False},
    "dspark_masks": BLOCK | {"markov_rank": 5, "sample_from_anchor": False},
    "dflash": BLOCK | {"algorithm": "dflash"},
    "dflash_masks": BLOCK | {"algorithm": "dflash", "sample_from_anchor": False},
    "eagle3": {"algorithm": "eagle3", "ttt_length": 3},
    "eagle3_llama": {"algorithm": "eagle3", "ttt_length": 3, "layout": "llama"},
}


def make(kind: str, target: str = "qwen3", **settings: Any) -> Drafter:
    """A drafter in evaluation mode; ``_cut`` behind a kind cuts its vocabulary."""
    torch.manual_seed(7)
    chosen = KINDS[kind.removesuffix("_cut")] | settings
    drafter = build_drafter(TARGETS[target], **chosen).eval()
    return with_vocabulary(drafter, KEPT) if kind.endswith("_cut") else drafter
