"""A tiny random target, and drafters whose drafts a test knows beforehand."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from drafters.config import DrafterConfig


def tiny_target(*, vocab_size: int = 37, num_layers: int = 3, seed: int = 0) -> Qwen3ForCausalLM:
    """Wide initial weights: greedy output then wanders instead of repeating one token."""
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=12,
        max_position_embeddings=256,
        initializer_range=0.5,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(config).eval()


@dataclass
class Drafts:
    token_ids: torch.Tensor
    probabilities: torch.Tensor | None


@dataclass
class DraftingState:
    features: list[torch.Tensor] = field(default_factory=list)
    next_tokens: list[int] = field(default_factory=list)

    @property
    def num_context(self) -> int:
        return len(self.next_tokens)


class ScriptedDrafter:
    """Proposes what `script(number of observed rows)` says, and keeps every state that it was asked to draft for."""

    def __init__(self, script: Callable[[int], list[int]], layer_ids: tuple[int, ...] = (-1, 1)) -> None:
        self.settings = DrafterConfig(target_layer_ids=layer_ids)
        self._script = script
        self.states: list[DraftingState] = []

    def start_drafting(self, seed: int = 0, stop_token_ids: Collection[int] = ()) -> DraftingState:
        self.states.append(DraftingState())
        return self.states[-1]

    def observe(self, state: DraftingState, features: torch.Tensor, next_token_ids: torch.Tensor) -> None:
        assert len(features) == len(next_token_ids)
        state.features.append(features)
        state.next_tokens += next_token_ids.tolist()

    def propose(self, state, anchor_id, *, temperature, generator, confidence_threshold) -> Drafts:
        assert anchor_id == state.next_tokens[-1]
        return Drafts(torch.tensor(self._script(state.num_context), dtype=torch.long), None)


class FixedDistributionDrafter(ScriptedDrafter):
    """Draws every draft from one distribution [V], whatever the context."""

    def __init__(self, distribution: torch.Tensor, block_size: int) -> None:
        super().__init__(lambda num_context: [])
        self._rows = distribution.repeat(block_size, 1)

    def propose(self, state, anchor_id, *, temperature, generator, confidence_threshold) -> Drafts:
        return Drafts(torch.multinomial(self._rows, 1, generator=generator)[:, 0], self._rows)
