"""What a Llama-like drafter takes from a target's config. Torch-free: the driver checks targets with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "rms_norm_eps")
"""Without these a target is no decoder with attention, a gated MLP and RMSNorm, which is what its drafter would be."""

LOGIT_SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier")
"""Factors that some targets put on their logits, and the loss would not."""

ROPE_OF_PLACES = ("default", "linear", "llama3", "yarn")
"""RoPE types that rotate a place alike however many there are. A drafter rotates context and blocks apart, a few rows
at a time: its keys would not fit together under the others, so it has default RoPE for them."""

COPIED = (
    *REQUIRED,
    "initializer_range",
    "max_position_embeddings",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "final_logit_softcapping",
)


def dense_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """A target's config as a dense decoder's: its width, heads and vocabulary, without experts or windows.

    Heads are as wide as ``head_dim`` says, else hidden size / heads. With latent attention (DeepSeek) that is the
    rotated part of a head.

    Args:
        values: The target's text config, as JSON or from transformers.

    Raises:
        ValueError: It lacks a number, or the target does to its logits what no drafter here does.
    """
    kind = values.get("model_type")
    missing = [name for name in REQUIRED if not isinstance(values.get(name), int | float)]
    if missing:
        raise ValueError(
            f"targets of model type {kind!r} are not known here, and this one's config cannot be read as a Llama-like "
            f"decoder's: no number for {', '.join(missing)}"
        )
    if values.get("is_encoder_decoder"):
        raise ValueError(f"a target of model type {kind!r} is encoder and decoder: drafters need a decoder alone")
    scaled = [f"{name} {values[name]}" for name in LOGIT_SCALES if values.get(name) not in (None, 1, 1.0)]
    if scaled:
        raise ValueError(f"a target of model type {kind!r} scales its logits ({', '.join(scaled)}), as no drafter does")
    heads = values["num_attention_heads"]
    dense = {name: values[name] for name in COPIED if values.get(name) is not None}
    return dense | {
        "num_key_value_heads": values.get("num_key_value_heads") or heads,
        "head_dim": values.get("head_dim") or values.get("qk_rope_head_dim") or values["hidden_size"] // heads,
        "hidden_act": values.get("hidden_act") or values.get("hidden_activation") or "silu",
        "attention_bias": bool(values.get("attention_bias")),
        "mlp_bias": bool(values.get("mlp_bias")),
        "target_model_type": kind,
        **_rope(values),
    }


def _rope(values: Mapping[str, Any]) -> dict[str, Any]:
    """RoPE of full-attention layers, over whole heads, with frequencies that depend on nothing but the place."""
    parameters = values.get("rope_parameters") or values.get("rope_scaling") or {}
    parameters = parameters.get("full_attention", parameters)
    theta = parameters.get("rope_theta") or values.get("rope_theta")
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    rope: dict[str, Any] = {"rope_type": "default"}
    if kind in ROPE_OF_PLACES:
        rope = {name: value for name, value in parameters.items() if name not in ("type", "partial_rotary_factor")}
        rope["rope_type"] = kind
    return {"rope_parameters": rope | {"rope_theta": theta or 10_000.0}}
