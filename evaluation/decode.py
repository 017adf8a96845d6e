"""Lossless decoding of prompts, speculatively or plainly, many at once: the stable entry points.

How a batch is decoded stands in `evaluation.batch_decoder`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor, nn

from drafters.drafter import Drafter
from evaluation.batch_decoder import BatchDecoder, Row, cut_below
from evaluation.fitting import check_fits, check_prompts


@dataclass
class SpeculativeOutput:
    """What `speculative_generate` returns; every list has one entry a row."""

    output_ids: list[list[int]] = field(default_factory=list)
    """Prompt and new tokens, cut to the limit and after the first stop token."""
    accepted_lengths: list[list[int]] = field(default_factory=list)
    """Tokens each round committed, bonus token included. Not cut."""
    proposal_lengths: list[list[int]] = field(default_factory=list)
    """Tokens each round drafted; in a round that a drafted stop token ended, those up to and including it."""
    accepted_draft_lengths: list[list[int]] = field(default_factory=list)
    """Drafts each round kept, bonus token excluded."""

    @classmethod
    def of_rows(cls, rows: Iterable[Row]) -> Self:
        """What decoded rows recorded."""
        output = cls()
        for row in rows:
            output.output_ids.append(row.tokens)
            output.accepted_lengths.append([entry.committed for entry in row.rounds])
            output.proposal_lengths.append([entry.proposed for entry in row.rounds])
            output.accepted_draft_lengths.append([entry.accepted for entry in row.rounds])
        return output


def speculative_generate(
    target_model: nn.Module,
    drafter: Drafter,
    input_ids: Iterable[Tensor | Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    stop_token_ids: Sequence[int] = (),
    confidence_threshold: float = 0.0,
    confidence_temperatures: Sequence[float] | None = None,
    seed: int = 0,
    batch_size: int | None = None,
) -> SpeculativeOutput:
    """Decode rows as a batch with the target's own distribution, drafting with `drafter`.

    Args:
        target_model: A transformers causal LM, in evaluation mode, on the drafter's device.
        drafter: What `drafters.load_drafter` returns.
        input_ids: Prompts: 1-D int64 tensors (or a 2-D tensor); lengths may differ.
        max_new_tokens: Most tokens that a row grows by.
        temperature: Below 1e-5 is greedy.
        stop_token_ids: A row ends after the first of these.
        confidence_threshold: Cuts a proposal before the first token the drafter is less sure of; 0 never cuts.
        confidence_temperatures: What confidence logits are divided by before that, one a drafted token
            (docs/confidence.md); None: nothing.
        seed: Row i has random numbers of its own, seeded seed + i: its result does not depend on other rows.
        batch_size: Most rows at once; one that ends makes room for the next. None decodes all of them together.

    Raises:
        ValueError: A prompt is empty or longer than the target's context, the drafter is another target's, the target
            cannot decode a batch, or a number is out of range.
    """
    prompts = _checked(target_model, input_ids, max_new_tokens, temperature, batch_size)
    check_fits(drafter, target_model, "this drafter")
    if confidence_temperatures is not None and len(confidence_temperatures) != drafter.settings.num_drafts:
        raise ValueError(
            f"{len(confidence_temperatures)} confidence temperatures for a drafter that drafts "
            f"{drafter.settings.num_drafts} tokens: give one for each"
        )
    with BatchDecoder(
        target_model,
        drafter,
        max_rows=batch_size or max(1, len(prompts)),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        stop_token_ids=stop_token_ids,
        cut=cut_below(confidence_threshold, confidence_temperatures),
    ) as decoder:
        return SpeculativeOutput.of_rows(decoder.run(prompts, seed))


def plain_generate(
    target_model: nn.Module,
    input_ids: Iterable[Tensor | Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    stop_token_ids: Sequence[int] = (),
    seed: int = 0,
    batch_size: int | None = None,
) -> list[list[int]]:
    """The target's own output, one token a row and forward pass: what speculative decoding is measured against.

    Arguments are those of `speculative_generate`.

    Returns:
        Prompt and new tokens of each row; a row ends after its first stop token or `max_new_tokens`.

    Raises:
        ValueError: As `speculative_generate`.
    """
    prompts = _checked(target_model, input_ids, max_new_tokens, temperature, batch_size)
    with BatchDecoder(
        target_model,
        None,
        max_rows=batch_size or max(1, len(prompts)),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        stop_token_ids=stop_token_ids,
    ) as decoder:
        return [row.tokens for row in decoder.run(prompts, seed)]


def greedy_generate(
    target_model: nn.Module, prompt: Tensor | Sequence[int], *, max_new_tokens: int, stop_token_ids: Sequence[int] = ()
) -> list[int]:
    """`plain_generate` of one prompt at temperature 0."""
    [tokens] = plain_generate(
        target_model, [prompt], max_new_tokens=max_new_tokens, stop_token_ids=stop_token_ids, batch_size=1
    )
    return tokens


def _checked(
    target_model: nn.Module,
    input_ids: Iterable[Tensor | Sequence[int]],
    max_new_tokens: int,
    temperature: float,
    batch_size: int | None,
) -> list[list[int]]:
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}: give at least 1")
    if temperature < 0:
        raise ValueError(f"temperature is {temperature}: give 0 (greedy) or more")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}: give at least 1, or None for all rows at once")
    prompts: list[list[int]] = [torch.as_tensor(prompt).tolist() for prompt in input_ids]
    check_prompts(prompts, target_model)
    return prompts
