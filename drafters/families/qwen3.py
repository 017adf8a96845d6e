"""Qwen3: q/k RMSNorm on each head, SwiGLU, pre-norm. Also the dense drafters of Qwen3's mixtures of experts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from transformers import PretrainedConfig, Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3MLP, Qwen3RMSNorm, Qwen3RotaryEmbedding

from drafters.families.family import Family
from drafters.families.layer import DraftAttention, DraftLayer, Float32Frequencies, PreNormLayer

EXPERT_SETTINGS = (
    "decoder_sparse_step",
    "mlp_only_layers",
    "moe_intermediate_size",
    "norm_topk_prob",
    "num_experts",
    "num_experts_per_tok",
    "num_local_experts",
    "output_router_logits",
    "router_aux_loss_coef",
)
"""What only mixtures of experts have; a drafter is dense."""


class Qwen3DraftAttention(DraftAttention, Qwen3Attention):
    """Qwen3's projections and head norms."""

    def __init__(self, config: Any, index: int) -> None:
        super().__init__(config, index)
        self.v_norm = nn.Identity()


class Qwen3Rotary(Float32Frequencies, Qwen3RotaryEmbedding):
    """Qwen3's rotary embedding."""


class Qwen3Family(Family):
    """Qwen3, dense or not."""

    name = "qwen3"
    architecture_prefix = "Qwen3"

    def draft_values(self, text_config: PretrainedConfig) -> dict[str, Any]:
        """The target's config without experts and sliding windows."""
        values = {name: value for name, value in text_config.to_dict().items() if name not in EXPERT_SETTINGS}
        return values | {"model_type": "qwen3", "use_sliding_window": False, "sliding_window": None}

    def read_config(self, values: Mapping[str, Any]) -> PretrainedConfig:
        """A `Qwen3Config`."""
        return Qwen3Config.from_dict(dict(values))

    def embedding(self, config: Any) -> nn.Embedding:
        """Plain."""
        return nn.Embedding(config.vocab_size, config.hidden_size)

    def norm(self, config: Any) -> nn.Module:
        """RMSNorm."""
        return Qwen3RMSNorm(config.hidden_size, config.rms_norm_eps)

    def rotary(self, config: Any) -> nn.Module:
        """Rotation of whole heads."""
        return Qwen3Rotary(config)

    def layer(self, config: Any, index: int, attention_inputs: int | None = None) -> DraftLayer:
        """A decoder layer with Qwen3's tensor names."""
        mlp_class: Callable[[Any], nn.Module] = Qwen3MLP
        attention = Qwen3DraftAttention(config, index)
        if attention_inputs is not None:
            attention.widen(attention_inputs)
        return PreNormLayer(attention, mlp_class(config), self.norm(config), self.norm(config))

    def check_warm_start(self, target_values: Mapping[str, Any], layer_id: int) -> None:
        """Every layer of a dense target."""
        if (kind := target_values.get("model_type")) != "qwen3":
            raise ValueError(f"the layers of {kind} are not those of its dense drafter: unset warm_start_layers")


QWEN3 = Qwen3Family()
