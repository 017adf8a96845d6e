"""Qwen3: q/k RMSNorm on each head, SwiGLU, pre-norm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import PretrainedConfig, Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3Attention,
    Qwen3MLP,
    Qwen3RMSNorm,
    Qwen3RotaryEmbedding,
    rotate_half,
)

from drafters.attention import BlockLayout, KeyValues, Rope, attend_blocks
from drafters.families.family import Family


class Qwen3BlockAttention(Qwen3Attention):  # type: ignore[misc]  # transformers ships no types
    """Qwen3's projections and head norms around block attention."""

    def project_context(self, context: Tensor, rope: Rope) -> KeyValues:
        """Keys and values of rows [B, T, D]; the rows are taken as they are, without a norm before."""
        keys = self.k_norm(self._heads(self.k_proj(context))).transpose(1, 2)
        values = self._heads(self.v_proj(context)).transpose(1, 2)
        return KeyValues(_rotate(keys, rope), values)

    def forward(self, blocks: Tensor, context: KeyValues, rope: Rope, layout: BlockLayout) -> Tensor:
        """[B, A·γ, D] → [B, A·γ, D]."""
        queries = _rotate(self.q_norm(self._heads(self.q_proj(blocks))).transpose(1, 2), rope)
        attended = attend_blocks(queries, context, self.project_context(blocks, rope), layout, self.scaling)
        output: Tensor = self.o_proj(attended.transpose(1, 2).flatten(2))
        return output

    def _heads(self, projected: Tensor) -> Tensor:
        return projected.unflatten(-1, (-1, self.head_dim))


class Qwen3BlockLayer(nn.Module):
    """A Qwen3 decoder layer of the block-parallel backbone; tensor names as in Qwen3."""

    def __init__(self, config: PretrainedConfig, index: int) -> None:
        super().__init__()
        self.self_attn = Qwen3BlockAttention(config, index)
        self.mlp = Qwen3MLP(config)
        self.input_layernorm = Qwen3RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = Qwen3RMSNorm(config.hidden_size, config.rms_norm_eps)

    def project_context(self, context: Tensor, rope: Rope) -> KeyValues:
        """Keys and values of context rows [B, T, D]."""
        return self.self_attn.project_context(context, rope)

    def forward(self, blocks: Tensor, context: KeyValues, rope: Rope, layout: BlockLayout) -> Tensor:
        """One layer over block rows [B, A·γ, D]."""
        blocks = blocks + self.self_attn(self.input_layernorm(blocks), context, rope, layout)
        output: Tensor = blocks + self.mlp(self.post_attention_layernorm(blocks))
        return output


class Float32Rotary(Qwen3RotaryEmbedding):  # type: ignore[misc]  # transformers ships no types
    """Rotary embedding whose frequencies stay float32 when the drafter is cast: bf16 cannot tell far positions apart."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        exact = self.inv_freq, self.original_inv_freq
        super()._apply(fn, recurse)
        self.inv_freq, self.original_inv_freq = (
            old.to(new.device) for old, new in zip(exact, (self.inv_freq, self.original_inv_freq), strict=True)
        )
        return self


def _rotate(heads: Tensor, rope: Rope) -> Tensor:
    """Rotate [B, heads, rows, head size] to the positions of ``rope``."""
    return heads * rope.cos[:, None] + rotate_half(heads) * rope.sin[:, None]


def _norm(config: PretrainedConfig) -> nn.Module:
    norm: nn.Module = Qwen3RMSNorm(config.hidden_size, config.rms_norm_eps)
    return norm


QWEN3 = Family(
    name="qwen3",
    architecture_prefix="Qwen3",
    config=Qwen3Config,
    block_layer=Qwen3BlockLayer,
    norm=_norm,
    rotary=Float32Rotary,
)
