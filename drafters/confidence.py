"""Confidence head: predicts the probability that the target accepts a slot's token (specs: "Confidence head")."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ConfidenceHead(nn.Module):
    """One logit a slot, from the backbone output and, if ``markov_rank`` is above 0, W1 of the previous token."""

    def __init__(self, hidden_size: int, markov_rank: int) -> None:
        super().__init__()
        self.proj = nn.Linear(hidden_size + markov_rank, 1)
        self._with_markov = markov_rank > 0

    def forward(self, hidden: Tensor, embedded: Tensor | None) -> Tensor:
        """[..., D] and [..., r] → logits [...]."""
        inputs = torch.cat([hidden, embedded], dim=-1) if self._with_markov and embedded is not None else hidden
        logits: Tensor = self.proj(inputs).squeeze(-1)
        return logits
