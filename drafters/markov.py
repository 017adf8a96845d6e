"""Markov heads: a low-rank bias on the logits that depends on the previous token (specs: "Markov head").

All forms add ``W2 · e`` to the logits, with ``e`` made from ``W1[previous token]``; they differ in how.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from drafters.projection import OutputProjection


class MarkovHead(nn.Module, ABC):
    """Base of the Markov heads: owns W1 and W2."""

    def __init__(self, vocab_size: int, rank: int) -> None:
        super().__init__()
        self.markov_w1 = nn.Embedding(vocab_size, rank)
        self.markov_w2 = OutputProjection(rank, vocab_size)

    def embed(self, previous_ids: Tensor) -> Tensor:
        """W1 of the previous tokens: [...] → [..., r]."""
        embedded: Tensor = self.markov_w1(previous_ids)
        return embedded

    def bias(self, latent: Tensor) -> Tensor:
        """What is added to the logits: [..., r] → [..., V]."""
        bias: Tensor = self.markov_w2(latent)
        return bias

    @abstractmethod
    def step(self, embedded: Tensor, hidden: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Latent of one slot.

        Args:
            embedded: [..., r] of `embed`.
            hidden: [..., D] backbone output of the slot.
            state: What the previous slot returned, None at slot 0.

        Returns:
            [..., r] for `bias`, and the state for the next slot.
        """

    def latent(self, embedded: Tensor, hidden: Tensor) -> Tensor:
        """Latents of all slots at once, teacher-forced: [..., γ, r] and [..., γ, D] → [..., γ, r]."""
        return self.step(embedded, hidden, None)[0]


class VanillaMarkovHead(MarkovHead):
    """The embedding as it is."""

    def step(self, embedded: Tensor, hidden: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The slot's own embedding."""
        return embedded, None


class GatedMarkovHead(MarkovHead):
    """``sigmoid(Linear([h ; e])) ⊙ e``."""

    def __init__(self, vocab_size: int, rank: int, hidden_size: int) -> None:
        super().__init__(vocab_size, rank)
        self.gate_proj = nn.Linear(hidden_size + rank, rank)

    def step(self, embedded: Tensor, hidden: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The slot's embedding, gated by what the backbone says."""
        gate = torch.sigmoid(self.gate_proj(torch.cat([hidden, embedded], dim=-1)))
        return gate * embedded, None


class RecurrentMarkovHead(MarkovHead):
    """A gated recurrence over the slots of a block: ``s ← σ(g)⊙s + (1−σ(g))⊙tanh(c)``, latent ``tanh(o)``."""

    def __init__(self, vocab_size: int, rank: int, hidden_size: int) -> None:
        super().__init__(vocab_size, rank)
        self.joint_proj = nn.Linear(2 * rank + hidden_size, 3 * rank)

    def step(self, embedded: Tensor, hidden: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """One step of the recurrence."""
        if state is None:
            state = torch.zeros_like(embedded)
        joint = self.joint_proj(torch.cat([state, embedded, hidden], dim=-1))
        gate, candidate, output = joint.chunk(3, dim=-1)
        gate = torch.sigmoid(gate)
        return torch.tanh(output), gate * state + (1 - gate) * torch.tanh(candidate)

    def latent(self, embedded: Tensor, hidden: Tensor) -> Tensor:
        """Latents of all slots, slot after slot: [..., γ, r] and [..., γ, D] → [..., γ, r]."""
        latents, state = [], None
        for slot in range(embedded.shape[-2]):
            latent, state = self.step(embedded[..., slot, :], hidden[..., slot, :], state)
            latents.append(latent)
        return torch.stack(latents, dim=-2)


def build_markov_head(kind: str, *, vocab_size: int, rank: int, hidden_size: int) -> MarkovHead:
    """The head of a ``markov_head_type``: ``vanilla``, ``gated`` or ``rnn``."""
    if kind == "vanilla":
        return VanillaMarkovHead(vocab_size, rank)
    if kind == "gated":
        return GatedMarkovHead(vocab_size, rank, hidden_size)
    if kind == "rnn":
        return RecurrentMarkovHead(vocab_size, rank, hidden_size)
    raise ValueError(f"markov_head_type {kind!r} must be vanilla, gated or rnn")
