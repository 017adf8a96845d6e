"""Llama-like drafters: SwiGLU, pre-norm, no norms on heads. What targets of no family of their own get.

Mistral's, DeepSeek's and other targets' drafters are Llama's dense twins (`families.dense`), Qwen2's have its biases.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from transformers import LlamaConfig, PretrainedConfig, Qwen2Config
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm, LlamaRotaryEmbedding
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, Qwen2MLP

from drafters.families.dense import dense_values
from drafters.families.family import Family
from drafters.families.layer import DraftAttention, DraftLayer, Float32Frequencies, PreNormLayer


class LlamaDraftAttention(DraftAttention, LlamaAttention):
    """Llama's projections."""

    def __init__(self, config: Any, index: int) -> None:
        super().__init__(config, index)
        self.q_norm, self.k_norm, self.v_norm = nn.Identity(), nn.Identity(), nn.Identity()


class Qwen2DraftAttention(DraftAttention, Qwen2Attention):
    """Qwen2's projections: q, k and v have biases."""

    def __init__(self, config: Any, index: int) -> None:
        super().__init__(config, index)
        self.q_norm, self.k_norm, self.v_norm = nn.Identity(), nn.Identity(), nn.Identity()


class LlamaRotary(Float32Frequencies, LlamaRotaryEmbedding):
    """Llama's rotary embedding."""


class LlamaFamily(Family):
    """Llama, and what looks like it."""

    name = "llama"
    architecture_prefix = "Llama"
    warm_starts: tuple[str, ...] = ("llama", "mistral")
    """Model types whose layers compute exactly what this family's do."""

    def draft_values(self, text_config: PretrainedConfig) -> dict[str, Any]:
        """The target's dense twin."""
        return dense_values(text_config.to_dict()) | {"model_type": self.name}

    def read_config(self, values: Mapping[str, Any]) -> PretrainedConfig:
        """A `LlamaConfig`."""
        return LlamaConfig.from_dict(dict(values))

    def embedding(self, config: Any) -> nn.Embedding:
        """Plain."""
        return nn.Embedding(config.vocab_size, config.hidden_size)

    def norm(self, config: Any) -> nn.Module:
        """RMSNorm."""
        return LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)

    def rotary(self, config: Any) -> nn.Module:
        """Rotation of whole heads."""
        return LlamaRotary(config)

    def layer(self, config: Any, index: int, attention_inputs: int | None = None) -> DraftLayer:
        """A decoder layer with Llama's tensor names."""
        attention = self._attention(config, index)
        if attention_inputs is not None:
            attention.widen(attention_inputs)
        return PreNormLayer(attention, self._mlp(config), self.norm(config), self.norm(config))

    def logit_softcap(self, config: Any) -> float | None:
        """``final_logit_softcapping``, where a target has it."""
        cap: float | None = getattr(config, "final_logit_softcapping", None)
        return cap

    def check_warm_start(self, target_values: Mapping[str, Any], layer_id: int) -> None:
        """Other targets' layers may have the same tensors and still compute something else."""
        kind = target_values.get("model_type")
        if kind not in self.warm_starts:
            raise ValueError(
                f"the layers of {kind} are not those of its {self.name} drafter: unset warm_start_layers (there is a "
                f"warm start for {' and '.join(self.warm_starts)})"
            )

    def _attention(self, config: Any, index: int) -> DraftAttention:
        return LlamaDraftAttention(config, index)

    def _mlp(self, config: Any) -> nn.Module:
        mlp_class: Callable[[Any], nn.Module] = LlamaMLP
        return mlp_class(config)


class Qwen2Family(LlamaFamily):
    """Qwen2 and Qwen2.5, dense or not."""

    name = "qwen2"
    architecture_prefix = "Qwen2"
    warm_starts = ("qwen2",)

    def read_config(self, values: Mapping[str, Any]) -> PretrainedConfig:
        """A `Qwen2Config`."""
        return Qwen2Config.from_dict(dict(values))

    def _attention(self, config: Any, index: int) -> DraftAttention:
        return Qwen2DraftAttention(config, index)

    def _mlp(self, config: Any) -> nn.Module:
        mlp_class: Callable[[Any], nn.Module] = Qwen2MLP
        return mlp_class(config)


LLAMA = LlamaFamily()
QWEN2 = Qwen2Family()
