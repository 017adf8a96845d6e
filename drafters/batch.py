"""What a drafter trains on: token ids, masks and the target's features.

Letters of all modules here: B batch, T tokens, D hidden size, V vocabulary, L captured layers, A anchors, γ block size,
r Markov rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class FeatureBatch:
    """One micro-batch, padded to a common length at the end of each row.

    Attributes:
        input_ids: [B, T] int64.
        loss_mask: [B, T] bool; true on the tokens that the target's answers consist of.
        attention_mask: [B, T] bool; false on padding.
        target_hidden_states: [B, T, L·D] outputs of the captured layers, concatenated in the order of their ids.
        target_last_hidden_states: [B, T, D] after the final norm. Only the rows that `Drafter.needed_rows` marks are
            read; the others may hold anything.
    """

    input_ids: Tensor
    loss_mask: Tensor
    attention_mask: Tensor
    target_hidden_states: Tensor
    target_last_hidden_states: Tensor

    @classmethod
    def from_tensors(
        cls,
        input_ids: Tensor,
        loss_mask: Tensor,
        attention_mask: Tensor | None,
        target_hidden_states: Tensor,
        target_last_hidden_states: Tensor,
    ) -> Self:
        """Check shapes and bring masks to bool.

        Args:
            input_ids: [B, T] integers.
            loss_mask: [B, T] 0/1 or bool.
            attention_mask: [B, T] 0/1 or bool; None if nothing is padding.
            target_hidden_states: [B, T, L·D] floating point.
            target_last_hidden_states: [B, T, D] floating point.

        Raises:
            ValueError: A shape does not fit the shape of ``input_ids``.
        """
        shape = tuple(input_ids.shape)
        if len(shape) != 2:
            raise ValueError(f"input_ids must be [B, T], got {list(shape)}")
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        for name, mask in (("loss_mask", loss_mask), ("attention_mask", attention_mask)):
            if tuple(mask.shape) != shape:
                raise ValueError(f"{name} is {list(mask.shape)}, but input_ids is {list(shape)}")
        features = {
            "target_hidden_states": target_hidden_states,
            "target_last_hidden_states": target_last_hidden_states,
        }
        for name, tensor in features.items():
            if tensor.dim() != 3 or tuple(tensor.shape[:2]) != shape:
                raise ValueError(f"{name} is {list(tensor.shape)}, but must be [B, T, …] with [B, T] = {list(shape)}")
        return cls(input_ids.long(), loss_mask.bool(), attention_mask.bool(), **features)

    def to(self, device: torch.device | str) -> FeatureBatch:
        """The same batch on another device."""
        return FeatureBatch(
            self.input_ids.to(device),
            self.loss_mask.to(device),
            self.attention_mask.to(device),
            self.target_hidden_states.to(device),
            self.target_last_hidden_states.to(device),
        )
