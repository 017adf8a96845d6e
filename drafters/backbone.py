"""The block-parallel backbone of DFlash and DSpark: one forward pass drafts whole blocks (specs: "Backbone")."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from drafters.anchors import PackedBlocks, anchor_candidates, block_inputs, block_positions
from drafters.attention import BlockLayout, attend_blocks
from drafters.batch import FeatureBatch
from drafters.cached_attention import attend_cached, positions_seen
from drafters.config import DrafterConfig
from drafters.drafter import Drafter, DraftState
from drafters.families.family import Family
from drafters.families.layer import DraftLayer, Rope
from drafters.key_values import KeyValues, RaggedCache

SCATTERED_OVER = 512
"""Positions that the ``permute_context`` control scatters context rows over."""


@dataclass
class BlockDraftState(DraftState):
    """Drafting of several sequences.

    Attributes:
        generators: One a sequence; the ``permute_context`` control draws positions from it.
    """

    generators: list[torch.Generator] = field(default_factory=list, repr=False)

    def open(self, seeds: Sequence[int]) -> None:
        """Add sequences without context."""
        super().open(seeds)
        self.generators += [torch.Generator().manual_seed(seed) for seed in seeds]

    def drop(self, sequence: int) -> None:
        """Forget a sequence; the last one takes its place."""
        super().drop(sequence)
        self.generators[sequence] = self.generators[-1]
        del self.generators[-1]


def run_layer(layer: DraftLayer, blocks: Tensor, context: KeyValues, rope: Rope, layout: BlockLayout) -> Tensor:
    """One layer over block rows [B, A·γ, D], which see context rows and their own block.

    Only block rows pass the input norm; context rows were projected as they are.
    """
    attention = layer.self_attn
    rows = layer.input_layernorm(blocks)
    queries, own = attention.queries(rows, rope), attention.keys_values(rows, rope)
    attended = attend_blocks(queries, context, own, layout, attention.scaling)
    return layer.finish(blocks, attention.output(attended))


class BlockBackbone(Drafter):
    """Backbone, drafting cache and frozen head; subclasses add heads and the loss."""

    def __init__(self, config: PretrainedConfig, settings: DrafterConfig, family: Family) -> None:
        super().__init__(config, settings, family)
        assert settings.target_layer_ids is not None, "settings are resolved"
        num_features = len(settings.target_layer_ids) * config.hidden_size
        self.fc = nn.Linear(num_features, config.hidden_size, bias=False)
        self.hidden_norm = family.norm(config)
        self.layers = nn.ModuleList(family.layer(config, index) for index in range(config.num_hidden_layers))
        self.norm = family.norm(config)
        self.rotary = family.rotary(config)

    def reset_buffers(self) -> None:
        """Make the rotary frequencies anew."""
        self.rotary = self.family.rotary(self.config)

    def needed_rows(self, loss_mask: Tensor) -> Tensor:
        """Row r where r and r + 1 are supervised: [B, T] → [B, T] bool."""
        return anchor_candidates(loss_mask)

    def block_hidden(self, batch: FeatureBatch, blocks: PackedBlocks, generators: Sequence[torch.Generator]) -> Tensor:
        """Backbone output of every slot of every block.

        Args:
            batch: B samples.
            blocks: M blocks, on the CPU.
            generators: One a sample; only the ``permute_context`` control draws from them.

        Returns:
            [M, S, D], after the final norm: the S slots that predict, γ of them or all but the anchor's.
        """
        block_size, device = self._block_size, batch.input_ids.device
        layout = BlockLayout.of_spans(blocks.spans, len(blocks.context_rows), block_size, device)
        context = self._fuse(_rows_at(batch.target_hidden_states, blocks.context_rows.to(device))[None])
        context_rope = self._rope(context, self._context_positions(batch, blocks, generators)[None].to(device))
        anchor_ids = batch.input_ids.flatten()[blocks.anchor_rows.to(device)]
        rows = self.embed_tokens(block_inputs(anchor_ids, block_size, self._mask_token_id).view(1, -1))
        block_rope = self._rope(rows, block_positions(blocks.anchors, block_size).view(1, -1).to(device))
        for layer in self._block_layers:
            rows = run_layer(layer, rows, layer.self_attn.keys_values(context, context_rope), block_rope, layout)
        hidden: Tensor = self.norm(rows)
        return hidden.view(len(anchor_ids), block_size, -1)[:, self._first_slot :]

    def start_drafting(self, max_sequences: int = 1, stop_token_ids: Collection[int] = ()) -> BlockDraftState:
        """A state without sequences. Blocks are drafted whole, whatever stop tokens are in them."""
        return BlockDraftState(RaggedCache(max_sequences))

    @torch.no_grad()
    def observe(
        self, state: BlockDraftState, features: Tensor, next_token_ids: Tensor, counts: Sequence[int], first: int = 0
    ) -> None:
        """Append context rows; the tokens that follow them are not used.

        Raises:
            ValueError: ``features`` is not [b, R, L·D].
        """
        if features.dim() != 3 or features.shape[-1] != self.fc.in_features:
            raise ValueError(f"features must be [b, R, {self.fc.in_features}], got {list(features.shape)}")
        context = self._fuse(features)
        sequences = range(first, first + len(counts))
        positions, length = _following(state, sequences, context)
        rope = self._rope(context, self._observed_positions(state, counts, positions, first))
        places = state.cache.places(positions, length, first)
        for index, layer in enumerate(self._block_layers):
            state.cache.append(index, layer.self_attn.keys_values(context, rope), places)
        for sequence, count in zip(sequences, counts, strict=True):
            state.num_context[sequence] += count

    def draft_hidden(self, state: BlockDraftState, anchor_ids: Tensor) -> Tensor:
        """Backbone output of each sequence's block, whose anchor follows its observed rows: [B] → [B, S, D].

        Raises:
            ValueError: Nothing was observed yet.
        """
        self._check_observed(state)
        inputs = anchor_ids.new_full((len(anchor_ids), self._block_size), self._mask_token_id)
        inputs[:, 0] = anchor_ids
        blocks = self.embed_tokens(inputs)
        positions, length = _following(state, range(len(anchor_ids)), blocks)
        # A block's rows stand where the next context will, for as long as it is being drafted.
        places = state.cache.places(positions, length)
        bias = positions_seen(positions[:, -1:], places.end, blocks.dtype)
        rope = self._rope(blocks, positions)
        for index, layer in enumerate(self._block_layers):
            attention = layer.self_attn
            rows = layer.input_layernorm(blocks)
            seen = state.cache.append(index, attention.keys_values(rows, rope), places)
            attended = attend_cached(attention.queries(rows, rope), seen, bias, attention.scaling)
            blocks = layer.finish(blocks, attention.output(attended))
        hidden: Tensor = self.norm(blocks)
        return hidden[:, self._first_slot :]

    @property
    def _block_layers(self) -> Iterable[DraftLayer]:
        return cast(Iterable[DraftLayer], self.layers)

    @property
    def _block_size(self) -> int:
        return self.settings.block_size

    @property
    def _first_slot(self) -> int:
        """The first slot that predicts. Each predicts the token after the last: slot 0 the one after the anchor, or,
        if the anchor's own slot does not predict, slot 1."""
        return self.settings.block_size - self.settings.num_drafts

    @property
    def _mask_token_id(self) -> int:
        assert self.settings.mask_token_id is not None, "settings are resolved"
        return self.settings.mask_token_id

    def _fuse(self, features: Tensor) -> Tensor:
        """Context rows of all layers: [B, T, L·D] → [B, T, D]."""
        fused: Tensor = self.hidden_norm(self.fc(features.to(self.embed_tokens.weight.dtype)))
        return fused

    def _rope(self, like: Tensor, positions: Tensor) -> Rope:
        return Rope(*self.rotary(like, positions))

    def _observed_positions(
        self, state: BlockDraftState, counts: Sequence[int], positions: Tensor, first: int
    ) -> Tensor:
        """RoPE positions of observed rows, [b, R]: their own, or those of the ``permute_context`` control."""
        if not self.settings.permute_context:
            return positions
        scattered = torch.zeros(positions.shape, dtype=torch.long)
        for row, count in enumerate(counts):
            scattered[row, :count] = _anywhere(count, state.generators[first + row])
        return scattered.to(positions.device)

    def _context_positions(
        self, batch: FeatureBatch, blocks: PackedBlocks, generators: Sequence[torch.Generator]
    ) -> Tensor:
        """RoPE positions of context rows, [N]: their own, or those of the ``permute_context`` control."""
        if not self.settings.permute_context:
            return blocks.context_positions
        positions = torch.empty(batch.input_ids.numel(), dtype=torch.long)
        for sample, generator in zip(batch.samples, generators, strict=True):
            positions[slice(*sample)] = _anywhere(sample.end - sample.start, generator)
        return positions[blocks.context_rows]


def _following(state: DraftState, sequences: range, rows: Tensor) -> tuple[Tensor, int]:
    """Positions [b, R] that rows [b, R, D] have when they follow what was observed, and where the furthest ends."""
    starts = [state.num_context[sequence] for sequence in sequences]
    num_rows = rows.shape[1]
    positions = torch.tensor(starts, device=rows.device)[:, None] + torch.arange(num_rows, device=rows.device)
    return positions, max(starts) + num_rows


def _anywhere(count: int, generator: torch.Generator) -> Tensor:
    """Positions that say nothing of a row's own, nor of how long the sample is: drafting draws as training does."""
    return torch.randint(SCATTERED_OVER, (count,), generator=generator)


def _rows_at(features: Tensor, places: Tensor) -> Tensor:
    """Rows [N, width] of features [B, T, width], by their place among all; as they are if all are wanted."""
    rows = features.flatten(0, 1)
    return rows if len(places) == len(rows) else rows.index_select(0, places)
