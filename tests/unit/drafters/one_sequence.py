"""Drafting of a single sequence: a batch of one, with what drafters take and give stripped of the batch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Drafts(NamedTuple):
    token_ids: Tensor
    probabilities: Tensor | None
    confidence: Tensor | None


class OneSequence:
    def __init__(self, drafter, stop_token_ids=(), seed=0) -> None:
        self.drafter = drafter
        self.state = drafter.start_drafting(stop_token_ids=stop_token_ids)
        self.state.open([seed])

    @property
    def num_context(self) -> int:
        return self.state.num_context[0]

    def keys_values(self, layer=0):
        """What the layer has cached of the observed rows."""
        return self.state.cache.sequence(layer, 0, self.num_context)

    def observe(self, features: Tensor, next_token_ids: Tensor) -> None:
        self.drafter.observe(self.state, features[None], next_token_ids[None], [len(features)])

    def propose(self, anchor_id: int, temperature=0.0, seed=0) -> Drafts:
        uniforms = torch.rand(1, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        proposal = self.drafter.propose(
            self.state, torch.tensor([anchor_id]), temperature=temperature, uniforms=uniforms if temperature else None
        )
        length = proposal.token_ids.shape[1] if proposal.lengths is None else int(proposal.lengths[0])
        tensors = (proposal.token_ids, proposal.probabilities, proposal.confidence)
        return Drafts(*(None if each is None else each[0, :length] for each in tensors))
