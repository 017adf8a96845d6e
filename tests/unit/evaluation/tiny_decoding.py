"""A tiny random target, and drafters whose drafts a test knows beforehand."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from drafters.config import DrafterConfig
from drafters.drafter import Proposal
from drafters.sampling import draw_tokens


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
class Observed:
    """What a drafter was told of one sequence."""

    features: list[torch.Tensor] = field(default_factory=list)
    next_tokens: list[int] = field(default_factory=list)

    @property
    def num_context(self) -> int:
        return len(self.next_tokens)


class ScriptedState:
    def __init__(self, everything: list[Observed]) -> None:
        self.sequences: list[Observed] = []
        self._everything = everything

    def open(self, seeds: Sequence[int]) -> None:
        new = [Observed() for _ in seeds]
        self.sequences += new
        self._everything += new

    def drop(self, sequence: int) -> None:
        self.sequences[sequence] = self.sequences[-1]
        del self.sequences[-1]


class ScriptedDrafter:
    """Proposes what `script(number of observed rows)` says, and keeps what it was told of every sequence."""

    target_model_type = "qwen3"

    def __init__(
        self, script: Callable[[int], list[int]], layer_ids: tuple[int, ...] = (-1, 1), vocab_size: int = 37
    ) -> None:
        self.settings = DrafterConfig(target_layer_ids=layer_ids)
        self.config = Qwen3Config(vocab_size=vocab_size, hidden_size=24)
        self._script = script
        self.observed: list[Observed] = []

    def start_drafting(self, max_sequences: int = 1, stop_token_ids: Collection[int] = ()) -> ScriptedState:
        return ScriptedState(self.observed)

    def observe(
        self,
        state: ScriptedState,
        features: torch.Tensor,
        next_token_ids: torch.Tensor,
        counts: Sequence[int],
        first: int = 0,
    ) -> None:
        assert features.shape[:2] == next_token_ids.shape
        for row, count in enumerate(counts):
            state.sequences[first + row].features.append(features[row, :count])
            state.sequences[first + row].next_tokens += next_token_ids[row, :count].tolist()

    def propose(self, state: ScriptedState, anchor_ids: torch.Tensor, *, temperature, uniforms) -> Proposal:
        assert anchor_ids.tolist() == [sequence.next_tokens[-1] for sequence in state.sequences]
        drafts = [self._script(sequence.num_context) for sequence in state.sequences]
        lengths = torch.tensor([len(tokens) for tokens in drafts])
        longest = max(map(len, drafts))
        padded = [tokens + [0] * (longest - len(tokens)) for tokens in drafts]
        return Proposal(torch.tensor(padded, dtype=torch.long).view(len(drafts), longest), lengths)


class FixedDistributionDrafter(ScriptedDrafter):
    """Draws every draft from one distribution [V], whatever the context."""

    def __init__(self, distribution: torch.Tensor, block_size: int) -> None:
        super().__init__(lambda num_context: [], vocab_size=len(distribution))
        self._distribution = distribution
        self._block_size = block_size

    def propose(self, state, anchor_ids, *, temperature, uniforms) -> Proposal:
        rows = self._distribution.expand(len(anchor_ids), self._block_size, -1)
        drafts = [draw_tokens(rows[:, slot], uniforms[:, slot]) for slot in range(self._block_size)]
        return Proposal(torch.stack(drafts, dim=1), probabilities=rows)
