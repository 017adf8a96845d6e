"""A transformers target over several sequences of different lengths, one forward pass for all of them.

The target's own cache is replaced by `RaggedCache`, where entry p of a sequence is what stands at its position p. Then
the only mask that decoding needs follows from positions: a row sees the entries up to its own, or a window of them.
Rejected drafts are never taken out; they stand past the end until they are written over.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from drafters.cached_attention import attend_cached, positions_seen
from drafters.key_values import KeyValues, Places, RaggedCache
from services.target.tap import FeatureTap, decoder_of

PACKED = "slipstream_packed"
"""Name of our attention among transformers' own."""

PREFILL_TOKENS = 16_384
"""Prompt tokens, padding included, of one forward pass; a longer prompt has one of its own."""


class RaggedTarget:
    """The target's side of decoding: its cache, its forward passes. A context manager around all of them.

    Args:
        model: A transformers causal LM in evaluation mode.
        max_sequences: Most sequences at once.
        layer_ids: Layers whose features are wanted, -1 for the embedding; None for no features.

    Raises:
        ValueError: It has layers that no position mask is right for, or an attention that takes no masks.
    """

    def __init__(self, model: nn.Module, max_sequences: int, layer_ids: Sequence[int] | None = None) -> None:
        self.device = next(model.parameters()).device
        self._model: Any = model
        self._decoder: Any = decoder_of(model)
        self._windows = _attention_windows(self._decoder.config)
        self._attention = _attention_of(self._decoder.config)
        self._cache = _PositionCache(max_sequences)
        self._tap = None if layer_ids is None else FeatureTap(model, layer_ids)
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            if self._attention == "sdpa":
                stack.enter_context(_packed_attention(self._decoder))
            if self._tap is not None:
                stack.enter_context(self._tap)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def prefill(self, prompts: Sequence[Sequence[int]], first: int) -> Tensor:
        """Begin sequences `first`, `first` + 1, … with prompts; returns the logits after each, [b, V]."""
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=self.device)
        rows = torch.zeros(len(prompts), max(map(len, prompts)), dtype=torch.long)
        for row, prompt in enumerate(prompts):
            rows[row, : len(prompt)] = torch.tensor(prompt)
        positions = torch.arange(rows.shape[1], device=self.device).expand(rows.shape)
        self._cache.aim(positions, rows.shape[1], first)
        # Right of a prompt is padding, which no row of it sees: transformers' own causal masks are right as they are.
        with _one_row_of_head(self._model, lengths - 1):
            return self._forward(rows, positions, None)[:, 0]

    def extend(self, token_ids: Tensor, starts: Sequence[int]) -> Tensor:
        """Run rows [B, Q] of all sequences, the first of each at its start; returns their logits [B, Q, V]."""
        num_rows = token_ids.shape[1]
        offsets = torch.arange(num_rows, device=self.device)
        positions = torch.tensor(starts, device=self.device)[:, None] + offsets
        end = self._cache.aim(positions, max(starts) + num_rows)
        masks = {
            kind: positions_seen(positions, end, self._decoder.dtype, window) for kind, window in self._windows.items()
        }
        # Models with one kind of layers take its mask as it is, those with several expect them by kind.
        mask = masks if len(masks) > 1 else next(iter(masks.values()))
        return self._forward(token_ids, positions, mask)

    def features(self, num_rows: int) -> Tensor:
        """The wanted layers' outputs for the first rows of the last forward pass, [b, num_rows, L·D]."""
        assert self._tap is not None, "this target was made without features"
        return torch.cat([output[:, :num_rows] for output in self._tap.take()], dim=-1)

    def move(self, source: int, place: int) -> None:
        """Put a sequence in the place of another."""
        self._cache.kept.move(source, place)

    def _forward(self, token_ids: Tensor, positions: Tensor, mask: Any) -> Tensor:
        # All rows reach the last layer: for a number, layers that share keys compute no others, and the tap sees none.
        output = self._model(
            input_ids=token_ids.to(self.device),
            position_ids=positions,
            attention_mask=mask,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=0,
        )
        logits: Tensor = output.logits
        return logits


class _PositionCache(Cache):
    """What transformers' layers write to and read from. It says that it is empty, as it is for every prefill; masks
    over what it holds are made here, by position."""

    def __init__(self, max_sequences: int) -> None:
        super().__init__(layers=[])
        self.kept = RaggedCache(max_sequences)
        self._places: Places | None = None
        self._is_new = False

    def aim(self, positions: Tensor, length: int, first: int | None = None) -> int:
        """Say where the next forward pass writes, sequences from `first` on if they begin with it; returns how many
        entries its attention sees."""
        self._places = self.kept.places(positions, length, first or 0)
        self._is_new = first is not None
        return self._places.end

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write a layer's rows; returns what they attend to."""
        assert self._places is not None
        rows = KeyValues(key_states, value_states)
        seen = self.kept.append(layer_idx, rows, self._places)
        return rows if self._is_new else seen


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' `sdpa`, without a copy of the keys for every query head where there is a mask of ours."""
    if attention_mask is None or not attention_mask.is_floating_point():
        attended, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        return attended, None
    attended = attend_cached(query, KeyValues(key, value), attention_mask, scaling)
    return attended.transpose(1, 2).contiguous(), None


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, sdpa_mask)


@contextmanager
def _packed_attention(decoder: Any) -> Iterator[None]:
    """The decoder stack computes attention as `packed_attention` does."""
    before = decoder.config._attn_implementation
    decoder.set_attn_implementation(PACKED)
    try:
        yield
    finally:
        decoder.set_attn_implementation(before)


@contextmanager
def _one_row_of_head(model: Any, rows: Tensor) -> Iterator[None]:
    """The head sees one row of each sequence only, [b]: prompts are long and vocabularies large."""

    def select(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden, *rest = inputs
        return hidden[torch.arange(len(rows), device=rows.device), rows][:, None], *rest

    handle = model.get_output_embeddings().register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


def _attention_windows(config: Any) -> dict[str, int | None]:
    """Sliding window by kind of layer, None where a layer sees everything before it.

    Raises:
        ValueError: A kind of layer is neither.
    """
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["full_attention" if window is None else "sliding_attention"]
    unknown = sorted(set(kinds) - {"full_attention", "sliding_attention"})
    if unknown or getattr(config, "attention_chunk_size", None):
        raise ValueError(
            f"cannot decode with a {config.model_type} target: its layers of kind {', '.join(unknown) or 'chunked'} "
            "keep more than keys and values by position; full_attention and sliding_attention do not"
        )
    return {kind: window if kind == "sliding_attention" else None for kind in sorted(set(kinds))}


def _attention_of(config: Any) -> str:
    """The attention that a target was loaded with.

    Raises:
        ValueError: It takes no masks.
    """
    attention = str(config._attn_implementation)
    if attention not in ("sdpa", "eager"):
        raise ValueError(
            f"cannot decode a batch with attention {attention!r}, which takes no mask by position: load the target "
            "with attn_implementation='sdpa'"
        )
    return attention
