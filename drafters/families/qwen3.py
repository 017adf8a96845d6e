"""Qwen3: q/k RMSNorm on each head, SwiGLU, pre-norm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3MLP, Qwen3RMSNorm, Qwen3RotaryEmbedding

from drafters.attention import BlockLayout, KeyValues, Rope, attend_blocks
from drafters.families.family import Family


class Qwen3BlockAttention(Qwen3Attention):
    """Qwen3's projections and head norms around block attention."""

    def project_context(self, context: Tensor, rope: Rope) -> KeyValues:
        """Keys and values of rows [B, T, D]; the rows are taken as they are, without a norm before."""
        keys = self.k_norm(self._heads(self.k_proj(context))).transpose(1, 2)
        return KeyValues(_rotate(keys, rope), self._heads(self.v_proj(context)).transpose(1, 2))

    def forward(  # type: ignore[override]  # keys come from a context, as in no transformers layer
        self, blocks: Tensor, context: KeyValues, rope: Rope, layout: BlockLayout
    ) -> Tensor:
        """[B, A·γ, D] → [B, A·γ, D]."""
        queries = _rotate(self.q_norm(self._heads(self.q_proj(blocks))).transpose(1, 2), rope)
        attended = attend_blocks(queries, context, self.project_context(blocks, rope), layout, self.scaling)
        output: Tensor = self.o_proj(attended.transpose(1, 2).flatten(2))
        return output

    def _heads(self, projected: Tensor) -> Tensor:
        return projected.view(*projected.shape[:-1], -1, self.head_dim)


class Qwen3BlockLayer(nn.Module):
    """A Qwen3 decoder layer of the block-parallel backbone; tensor names as in Qwen3."""

    def __init__(self, config: Any, index: int) -> None:
        super().__init__()
        mlp_class: Callable[[Any], nn.Module] = Qwen3MLP
        self.self_attn = Qwen3BlockAttention(config, index)
        self.mlp = mlp_class(config)
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


class Float32Rotary(Qwen3RotaryEmbedding):
    """Rotary embedding whose frequencies stay float32 when the drafter is cast.

    In bf16 far positions would fall together.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        exact = dict(self.named_buffers())
        super()._apply(fn, recurse)
        for name, buffer in exact.items():
            setattr(self, name, buffer.to(getattr(self, name).device))
        return self


def _rotate(heads: Tensor, rope: Rope) -> Tensor:
    """Rotate [B, heads, rows, head size] to the positions of ``rope``."""
    first, second = heads.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return heads * rope.cos[:, None] + turned * rope.sin[:, None]


def _norm(config: PretrainedConfig) -> nn.Module:
    return Qwen3RMSNorm(config.hidden_size, config.rms_norm_eps)


def _rotary(config: Any) -> nn.Module:
    return Float32Rotary(config)


QWEN3 = Family(
    name="qwen3",
    architecture_prefix="Qwen3",
    config=Qwen3Config,
    block_layer=Qwen3BlockLayer,
    norm=_norm,
    rotary=_rotary,
)
