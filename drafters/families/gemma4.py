"""Gemma-4: four norms a layer, head and value norms, partly rotated heads, scaled embedding, capped logits.

Drafters have full-attention layers only, and none of what some sizes add to theirs: experts, per-layer inputs, keys and
values shared between layers (specs: "Gemma-4 layer").
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from transformers import Gemma4TextConfig, Gemma4UnifiedTextConfig, PretrainedConfig
from transformers.models.gemma4.modeling_gemma4 import (
    Gemma4RMSNorm,
    Gemma4TextAttention,
    Gemma4TextMLP,
    Gemma4TextRotaryEmbedding,
)

from drafters.families.family import Family
from drafters.families.layer import DraftAttention, DraftLayer, Float32Frequencies, ScaledEmbedding

CONFIGS: Mapping[str, type[PretrainedConfig]] = {
    "gemma4_text": Gemma4TextConfig,
    "gemma4_unified_text": Gemma4UnifiedTextConfig,
}
"""Config class by model type."""

NOT_IN_DRAFTS: Mapping[str, Any] = {
    "enable_moe_block": False,
    "hidden_size_per_layer_input": 0,
    "num_kv_shared_layers": 0,
    "use_double_wide_mlp": False,
}
"""What some targets' layers have and no draft layer does."""

DEFAULT_GLOBAL_HEAD_DIM = 512
"""Head size of full-attention layers where no config says it: transformers' default."""


class Gemma4DraftAttention(DraftAttention, Gemma4TextAttention):
    """Gemma-4's projections, with norms on the heads of queries, keys and values; values may be the raw keys."""


class Gemma4DraftLayer(DraftLayer):
    """Norms before and after attention and MLP; at the end everything, residual included, times `layer_scalar`."""

    def __init__(self, config: Any, index: int, attention_inputs: int | None) -> None:
        super().__init__()
        mlp_class: Callable[[Any, int], nn.Module] = Gemma4TextMLP
        self.self_attn = Gemma4DraftAttention(config, index)
        if attention_inputs is not None:
            self.self_attn.widen(attention_inputs)
        self.mlp = mlp_class(config, index)
        self.input_layernorm = _norm(config)
        self.post_attention_layernorm = _norm(config)
        self.pre_feedforward_layernorm = _norm(config)
        self.post_feedforward_layernorm = _norm(config)
        self.layer_scalar: Tensor
        self.register_buffer("layer_scalar", self.input_layernorm.weight.detach().new_ones(1))

    def finish(self, residual: Tensor, attended: Tensor) -> Tensor:
        """The rest of the layer."""
        rows = residual + self.post_attention_layernorm(attended)
        rows = rows + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(rows)))
        return rows * self.layer_scalar


class Gemma4Rotary(Float32Frequencies, Gemma4TextRotaryEmbedding):
    """Rotary embedding of full-attention layers."""

    def forward(self, like: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """(Cosines, sines), each [B, rows, head size], in the dtype of ``like``."""
        cos, sin = super().forward(like, positions, "full_attention")
        return cos, sin


class Gemma4Family(Family):
    """Gemma-4 of any size, alone or inside a multimodal model."""

    name = "gemma4"
    architecture_prefix = "Gemma4"

    def draft_values(self, text_config: PretrainedConfig) -> dict[str, Any]:
        """The target's config with nothing that draft layers lack, and its head sizes in the older shape too."""
        values = text_config.to_dict()
        head_dim, num_key_value_heads = _full_attention_shape(values)
        values |= {name: value for name, value in NOT_IN_DRAFTS.items() if name in values}
        values |= {"global_head_dim": head_dim, "num_global_key_value_heads": num_key_value_heads}
        values |= {
            "target_model_type": _outer_model_type(text_config),
            "target_text_model_type": text_config.model_type,
        }
        del values["per_layer_config"]
        return values

    def read_config(self, values: Mapping[str, Any]) -> PretrainedConfig:
        """The config of its model type, from either shape of config.

        Older configs have ``global_head_dim`` and ``num_global_key_value_heads``, newer ones ``per_layer_config``,
        whose keys are the target's layer numbers. The result has both shapes, with an entry for each draft layer.
        """
        values = dict(values)
        head_dim, num_key_value_heads = _full_attention_shape(values)
        values.pop("per_layer_config", None)
        older = {"global_head_dim": head_dim, "num_global_key_value_heads": num_key_value_heads}
        config = CONFIGS[values["model_type"]].from_dict(values | older)
        for name, value in older.items():  # transformers drops them, but older readers need them
            setattr(config, name, value)
        return config

    def embedding(self, config: Any) -> nn.Embedding:
        """Times √D."""
        return ScaledEmbedding(config.vocab_size, config.hidden_size, scale=config.hidden_size**0.5)

    def norm(self, config: Any) -> nn.Module:
        """RMSNorm that multiplies by its weight."""
        return _norm(config)

    def rotary(self, config: Any) -> nn.Module:
        """Rotation of the first part of each half head."""
        return Gemma4Rotary(config)

    def layer(self, config: Any, index: int, attention_inputs: int | None = None) -> DraftLayer:
        """A full-attention layer."""
        return Gemma4DraftLayer(config, index, attention_inputs)

    def logit_softcap(self, config: Any) -> float | None:
        """``final_logit_softcapping``."""
        cap: float | None = config.final_logit_softcapping
        return cap

    def check_warm_start(self, target_values: Mapping[str, Any], layer_id: int) -> None:
        """Only full-attention layers have a draft layer's heads."""
        kinds = target_values.get("layer_types") or []
        full = [index for index, kind in enumerate(kinds) if kind == "full_attention"]
        if layer_id not in full:
            raise ValueError(f"target layer {layer_id} is no full-attention layer, which every draft layer is: {full}")


def _norm(config: Any) -> Gemma4RMSNorm:
    return Gemma4RMSNorm(config.hidden_size, config.rms_norm_eps)


def _full_attention_shape(values: Mapping[str, Any]) -> tuple[int, int | None]:
    """Head size of full-attention layers, and their ``num_global_key_value_heads``."""
    if "global_head_dim" in values:
        return values["global_head_dim"], values.get("num_global_key_value_heads")
    if "per_layer_config" not in values:
        return DEFAULT_GLOBAL_HEAD_DIM, values.get("num_global_key_value_heads")
    kinds = dict(enumerate(values.get("layer_types") or []))
    entries = [
        entry
        for layer, entry in (values["per_layer_config"] or {}).items()
        if kinds.get(int(layer), "full_attention") == "full_attention"
    ]
    shapes = {(entry.get("head_dim"), entry.get("num_key_value_heads")) for entry in entries}
    if len(shapes) > 1:
        raise ValueError(
            f"full-attention layers of per_layer_config differ, {sorted(map(str, shapes))}: which to draft?"
        )
    head_dim, num_key_value_heads = shapes.pop() if shapes else (None, None)
    return head_dim or values["head_dim"], num_key_value_heads


def _outer_model_type(text_config: PretrainedConfig) -> str:
    """Model type of the multimodal model that a text config is part of: ``gemma4_text`` → ``gemma4``."""
    return text_config.model_type.removesuffix("_text")


GEMMA4 = Gemma4Family()
