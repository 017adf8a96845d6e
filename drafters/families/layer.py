"""Decoder layers cut where drafters need it: projections, what attends to what (not here), and all the rest.

Which rows attend to which differs between drafters; projections, norms and MLPs differ between families. So a family
gives layers without the attention in their middle, and a drafter puts its own there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from drafters.key_values import KeyValues


class Rope(NamedTuple):
    """Cosine and sine of rotary positions, each [B, rows, head size]."""

    cos: Tensor
    sin: Tensor


class DraftAttention(nn.Module):
    """Projections and head norms around an attention; mixed into a transformers attention class, which makes them.

    Attributes:
        scaling: Multiplies the scores.
        head_dim: Head size.
    """

    # Modules of the transformers class, whose types differ between families; norms may be nothing, v_proj None.
    q_proj: Any
    k_proj: Any
    v_proj: Any
    o_proj: Any
    q_norm: Any
    k_norm: Any
    v_norm: Any
    scaling: float
    head_dim: int

    def queries(self, rows: Tensor, rope: Rope) -> Tensor:
        """Rotated queries: [B, rows, inputs] → [B, heads, rows, head size]."""
        queries = self._heads(self.q_proj(rows))
        return rotate(self.q_norm(queries).transpose(1, 2), rope).to(queries.dtype)

    def keys_values(self, rows: Tensor, rope: Rope) -> KeyValues:
        """Rotated keys, and values, of rows [B, rows, inputs]. Without a v_proj the raw keys are the values."""
        keys = self._heads(self.k_proj(rows))
        values = keys if self.v_proj is None else self._heads(self.v_proj(rows))
        rotated = rotate(self.k_norm(keys).transpose(1, 2), rope)
        # Under autocast norms and rotation come out wider than the projections.
        return KeyValues(rotated.to(keys.dtype), self.v_norm(values).transpose(1, 2).to(keys.dtype))

    def output(self, attended: Tensor) -> Tensor:
        """[B, heads, rows, head size] → [B, rows, D]."""
        output: Tensor = self.o_proj(attended.transpose(1, 2).flatten(2))
        return output

    def widen(self, attention_inputs: int) -> None:
        """Let q, k and v project rows of another width; their weights are new."""
        for name in ("q_proj", "k_proj", "v_proj"):
            old = getattr(self, name)
            if old is not None:
                setattr(self, name, nn.Linear(attention_inputs, old.out_features, bias=old.bias is not None))

    def _heads(self, projected: Tensor) -> Tensor:
        return projected.view(*projected.shape[:-1], -1, self.head_dim)


class DraftLayer(nn.Module, ABC):
    """A decoder layer whose attention its drafter computes: ``finish(rows, attended)`` after ``self_attn``.

    Attributes:
        self_attn: Projections.
        input_layernorm: Norm of rows before `self_attn`.
    """

    self_attn: DraftAttention
    input_layernorm: nn.Module

    @abstractmethod
    def finish(self, residual: Tensor, attended: Tensor) -> Tensor:
        """The rest of the layer: residual connection around attention, then the MLP.

        Args:
            residual: [B, rows, D] what the layer adds attention to.
            attended: [B, rows, D] of `DraftAttention.output`.

        Returns:
            [B, rows, D].
        """


class PreNormLayer(DraftLayer):
    """``x + attention``, then ``x + mlp(norm(x))``: Qwen and Llama."""

    def __init__(
        self, attention: DraftAttention, mlp: nn.Module, input_layernorm: nn.Module, post_attention_layernorm: nn.Module
    ) -> None:
        super().__init__()
        self.self_attn = attention
        self.mlp = mlp
        self.input_layernorm = input_layernorm
        self.post_attention_layernorm = post_attention_layernorm

    def finish(self, residual: Tensor, attended: Tensor) -> Tensor:
        """The rest of the layer."""
        rows = residual + attended
        output: Tensor = rows + self.mlp(self.post_attention_layernorm(rows))
        return output


class Float32Frequencies(nn.Module):
    """Mixed into a transformers rotary embedding: its frequencies stay float32 when the drafter is cast.

    In bf16 far positions would fall together.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        exact = dict(self.named_buffers())
        super()._apply(fn, recurse)
        for name, buffer in exact.items():
            setattr(self, name, buffer.to(getattr(self, name).device))
        return self


class ScaledEmbedding(nn.Embedding):
    """Embedding times a number, which is first rounded to the weight's dtype."""

    def __init__(self, num_embeddings: int, embedding_dim: int, scale: float, **options: Any) -> None:
        super().__init__(num_embeddings, embedding_dim, **options)
        self.scale = scale

    def forward(self, input: Tensor) -> Tensor:
        """[...] → [..., D]."""
        return super().forward(input) * torch.tensor(self.scale, dtype=self.weight.dtype, device=self.weight.device)


def rotate(heads: Tensor, rope: Rope) -> Tensor:
    """Rotate [B, heads, rows, head size] to the positions of ``rope``."""
    first, second = heads.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return heads * rope.cos[:, None] + turned * rope.sin[:, None]
