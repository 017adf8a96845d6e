"""What a drafter needs to know of its target's family."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn
from transformers import PretrainedConfig

from drafters.attention import BlockLayout, KeyValues, Rope


class BlockLayer(Protocol):
    """A decoder layer whose keys and values come from a shared context and from its own blocks."""

    def project_context(self, context: Tensor, rope: Rope) -> KeyValues:
        """Keys and values of context rows [B, T, D]."""

    def __call__(self, blocks: Tensor, context: KeyValues, rope: Rope, layout: BlockLayout) -> Tensor:
        """One layer over block rows [B, A·γ, D]."""


@dataclass(frozen=True)
class Family:
    """A family of targets.

    Attributes:
        name: The target's ``model_type``.
        architecture_prefix: How names of its drafters' architectures begin in a checkpoint.
        config: transformers' config class.
        block_layer: (config, layer index) → a `BlockLayer` module with the family's own tensor names.
        norm: config → norm over the hidden size.
        rotary: config → module (any tensor of the wanted dtype and device, positions [B, rows]) → (cos, sin), with
            frequencies that stay float32 whatever the drafter's dtype.
    """

    name: str
    architecture_prefix: str
    config: type[PretrainedConfig]
    block_layer: Callable[[PretrainedConfig, int], nn.Module]
    norm: Callable[[PretrainedConfig], nn.Module]
    rotary: Callable[[PretrainedConfig], nn.Module]
