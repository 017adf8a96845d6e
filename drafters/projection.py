"""A linear layer onto the vocabulary, whose weight others may read."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional


class OutputProjection(nn.Linear):
    """[..., D] → [..., V] without bias."""

    def __init__(self, in_features: int, vocab_size: int) -> None:
        super().__init__(in_features, vocab_size, bias=False)

    def forward(self, rows: Tensor | None) -> Tensor:
        """Logits of rows; of None, the weight itself."""
        return self.weight.view_as(self.weight) if rows is None else functional.linear(rows, self.weight)

    def table(self) -> Tensor:
        """The weight [V, D], for what multiplies with it chunk by chunk.

        It comes through a call of this module, because ZeRO-3 brings a module's weights together only around its
        forward and its backward.
        """
        return cast(Tensor, self(None))


def soft_capped(logits: Tensor, cap: float | None) -> Tensor:
    """c · tanh(logits / c); the logits themselves without a cap c."""
    return cap * torch.tanh(logits / cap) if cap else logits
