"""What a drafter trains on: token ids, masks and the target's features.

Letters of all modules here: B batch, T tokens, D hidden size, V vocabulary, L captured layers, A anchors, γ block size,
r Markov rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple, Self

import torch
from torch import Tensor


class Span(NamedTuple):
    """Rows from `start` to right before `end`."""

    start: int
    end: int


@dataclass(frozen=True)
class FeatureBatch:
    """One micro-batch: each row one sample, padded at its end to a common length, or one row of samples end to end.

    Attributes:
        input_ids: [B, T] int64.
        loss_mask: [B, T] bool; true on the tokens that the target's answers consist of.
        attention_mask: [B, T] bool; false on padding.
        target_hidden_states: [B, T, L·D] outputs of the captured layers, concatenated in the order of their ids.
        target_last_hidden_states: [B, T, D] after the final norm. Only the rows that `Drafter.needed_rows` marks are
            read; the others may hold anything.
        loss_lengths: [samples] float32, what Eagle3 divides the sum of each sample's losses by: T as the reference has
            it, or the sample's own length, so that it counts the same whatever it is batched with.
        sample_lengths: Packed: the only row holds samples of these many tokens end to end. None: each row is one.
    """

    input_ids: Tensor
    loss_mask: Tensor
    attention_mask: Tensor
    target_hidden_states: Tensor
    target_last_hidden_states: Tensor
    loss_lengths: Tensor
    sample_lengths: tuple[int, ...] | None = None

    @property
    def samples(self) -> tuple[Span, ...]:
        """Where each sample stands among the tokens of all rows, counted row by row."""
        num_rows, length = self.input_ids.shape
        lengths = self.sample_lengths or (length,) * num_rows
        return tuple(Span(end - length, end) for length, end in zip(lengths, accumulate(lengths), strict=True))

    @classmethod
    def from_tensors(
        cls,
        input_ids: Tensor,
        loss_mask: Tensor,
        attention_mask: Tensor | None,
        target_hidden_states: Tensor,
        target_last_hidden_states: Tensor,
        loss_lengths: Tensor | None = None,
        sample_lengths: Sequence[int] | None = None,
    ) -> Self:
        """Check shapes and bring masks to bool.

        Args:
            input_ids: [B, T] integers.
            loss_mask: [B, T] 0/1 or bool.
            attention_mask: [B, T] 0/1 or bool; None if nothing is padding.
            target_hidden_states: [B, T, L·D] floating point.
            target_last_hidden_states: [B, T, D] floating point.
            loss_lengths: [samples] above 0; None is T for every row, and packed the sample's own length.
            sample_lengths: Tokens of the samples that a packed row holds end to end; None is one sample a row.

        Raises:
            ValueError: There is no token at all, or a shape does not fit the shape of ``input_ids``.
        """
        shape = tuple(input_ids.shape)
        if len(shape) != 2 or 0 in shape:
            raise ValueError(f"input_ids must be [B, T], neither of them 0, got {list(shape)}")
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
        lengths = (shape[1],) * shape[0] if sample_lengths is None else tuple(sample_lengths)
        if loss_lengths is None:
            loss_lengths = torch.tensor(lengths, device=input_ids.device)
        if tuple(loss_lengths.shape) != (len(lengths),):
            raise ValueError(f"loss_lengths is {list(loss_lengths.shape)}, but there are {len(lengths)} samples")
        if sample_lengths is not None and (shape[0] != 1 or sum(sample_lengths) != shape[1] or min(sample_lengths) < 1):
            raise ValueError(
                f"samples of {list(sample_lengths)} tokens do not fill input_ids {list(shape)}: packed, it must be "
                "[1, T] with T their sum"
            )
        return cls(
            input_ids.long(),
            loss_mask.bool(),
            attention_mask.bool(),
            **features,
            loss_lengths=loss_lengths.float(),
            sample_lengths=None if sample_lengths is None else tuple(sample_lengths),
        )

    def per_sample(self, values: Tensor | None, name: str) -> Tensor:
        """One number a sample, float32 on the batch's device; ones if none are given.

        Args:
            values: [samples].
            name: Of the values, for the message.

        Raises:
            ValueError: There are more or fewer values than samples.
        """
        num_samples = len(self.samples)
        if values is None:
            return torch.ones(num_samples, device=self.input_ids.device)
        if tuple(values.shape) != (num_samples,):
            raise ValueError(f"{name} is {list(values.shape)}, but there are {num_samples} samples: give one a sample")
        return values.to(self.input_ids.device, torch.float32)

    def check_token_ids(self, vocab_size: int) -> None:
        """Check that every token id is one of a vocabulary.

        Raises:
            ValueError: One is not; the message says which, in which sample and at which token.
        """
        smallest, largest = self.input_ids.aminmax()
        if smallest >= 0 and largest < vocab_size:
            return
        outside = (self.input_ids < 0) | (self.input_ids >= vocab_size)
        place = int(outside.flatten().nonzero()[0])
        raise ValueError(
            f"token id {int(self.input_ids.flatten()[place])} at {self._describe(place)} is outside the drafter's "
            f"vocabulary of {vocab_size}: was the batch made with another target's tokenizer?"
        )

    def check_finite(self, last_rows: Tensor) -> None:
        """Check that features which training reads are numbers.

        Args:
            last_rows: [B, T] bool, the rows of the target's last hidden state that are read.

        Raises:
            ValueError: There is a NaN or an infinity; the message says in which sample and at which token.
        """
        # A row whose sum is finite has no NaN and no infinity, and sums take a thirtieth of the time.
        context = self.target_hidden_states.sum(-1, dtype=torch.float32).isfinite()
        last = self.target_last_hidden_states.sum(-1, dtype=torch.float32).isfinite()
        if bool((context & (last | ~last_rows)).all()):
            return
        # Masked attention multiplies values that it does not see by zero, which leaves a NaN a NaN: every row counts.
        context = ~self.target_hidden_states.isfinite().all(-1)
        last = ~self.target_last_hidden_states.isfinite().all(-1) & last_rows
        if not bool((context | last).any()):
            return
        name, rows = ("target_hidden_states", context) if context.any() else ("target_last_hidden_states", last)
        place = int(rows.flatten().nonzero()[0])
        raise ValueError(
            f"{name} has NaN or infinite values at {int(rows.sum())} of {rows.numel()} tokens, {self._describe(place)} "
            "first: the target overflows (try target.dtype bfloat16 or float32), or the features were damaged"
        )

    def to(self, device: torch.device | str) -> FeatureBatch:
        """The same batch on another device."""
        return FeatureBatch(
            self.input_ids.to(device),
            self.loss_mask.to(device),
            self.attention_mask.to(device),
            self.target_hidden_states.to(device),
            self.target_last_hidden_states.to(device),
            self.loss_lengths.to(device),
            self.sample_lengths,
        )

    def _describe(self, place: int) -> str:
        """Where a token stands that is at this place among those of all rows."""
        sample = next(index for index, span in enumerate(self.samples) if place < span.end)
        return f"token {place - self.samples[sample].start} of sample {sample}"
