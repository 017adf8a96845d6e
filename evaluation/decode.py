"""Lossless speculative decoding with a transformers target (specs "Decoding, all drafters, round by round").

A round: the drafter proposes up to γ tokens after the anchor, one target forward scores anchor and drafts together,
the acceptance rule keeps a prefix and adds one token, the target's cache loses the rejected rows, and the drafter is
given the features of the rows that stay. Rows decode one after another.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from drafters.drafter import Drafter, Proposal
from evaluation.accept import Verdict, distribution, draw, is_greedy, verify_greedy, verify_sampled
from services.target.tap import FeatureTap


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


@torch.inference_mode()
def speculative_generate(
    target_model: nn.Module,
    drafter: Drafter,
    input_ids: Iterable[Tensor | Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    stop_token_ids: Sequence[int] = (),
    confidence_threshold: float = 0.0,
    seed: int = 0,
) -> SpeculativeOutput:
    """Decode each row with the target's own distribution, drafting with `drafter`.

    Args:
        target_model: A transformers causal LM, in evaluation mode, on the drafter's device.
        drafter: What `drafters.load_drafter` returns.
        input_ids: Prompts: 1-D int64 tensors (or a 2-D tensor); lengths may differ.
        max_new_tokens: Most tokens that a row grows by.
        temperature: Below 1e-5 is greedy.
        stop_token_ids: A row ends after the first of these.
        confidence_threshold: Cuts a proposal before the first token the drafter is less sure of; 0 never cuts.
        seed: Row i has random numbers of its own, seeded seed + i: its result does not depend on other rows.

    Raises:
        ValueError: A prompt is empty, or a number is out of range.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}: give at least 1")
    if temperature < 0:
        raise ValueError(f"temperature is {temperature}: give 0 (greedy) or more")
    device = next(target_model.parameters()).device
    output = SpeculativeOutput()
    layer_ids = drafter.settings.target_layer_ids
    assert layer_ids is not None, "a drafter's settings are resolved"
    with FeatureTap(target_model, layer_ids) as tap:
        for row, prompt in enumerate(input_ids):
            decoder = _RowDecoder(
                target_model,
                drafter,
                tap,
                state=drafter.start_drafting(seed + row, stop_token_ids),
                temperature=temperature,
                generator=None if is_greedy(temperature) else torch.Generator(device).manual_seed(seed + row),
                confidence_threshold=confidence_threshold,
                stop_token_ids=frozenset(stop_token_ids),
            )
            decoder.run(_prompt_tokens(prompt, row), max_new_tokens)
            output.output_ids.append(decoder.tokens)
            output.accepted_lengths.append([entry.accepted for entry in decoder.rounds])
            output.proposal_lengths.append([entry.proposed for entry in decoder.rounds])
            output.accepted_draft_lengths.append([entry.accepted_drafts for entry in decoder.rounds])
    return output


@torch.inference_mode()
def greedy_generate(
    target_model: nn.Module, prompt: Tensor | Sequence[int], *, max_new_tokens: int, stop_token_ids: Sequence[int] = ()
) -> list[int]:
    """The target's own greedy output, one token a forward: what speculative decoding is measured against.

    Returns:
        Prompt and new tokens; ends after the first stop token or `max_new_tokens`.
    """
    tokens = _prompt_tokens(prompt, row=0)
    limit = len(tokens) + max_new_tokens
    cache = DynamicCache()
    pending = list(tokens)
    while len(tokens) < limit:
        chosen = int(_forward(target_model, pending, cache, last_row_only=True)[-1].argmax())
        tokens.append(chosen)
        if chosen in stop_token_ids:
            break
        pending = [chosen]
    return tokens


class _Round(NamedTuple):
    accepted: int
    proposed: int
    accepted_drafts: int


class _RowDecoder:
    """One row's decoding: its tokens, its cache, its drafting state."""

    def __init__(
        self,
        target_model: nn.Module,
        drafter: Drafter,
        tap: FeatureTap,
        *,
        state: Any,
        temperature: float,
        generator: torch.Generator | None,
        confidence_threshold: float,
        stop_token_ids: frozenset[int],
    ) -> None:
        self.tokens: list[int] = []
        self.rounds: list[_Round] = []
        self._target_model = target_model
        self._drafter = drafter
        self._tap = tap
        self._temperature = temperature
        self._generator = generator
        self._confidence_threshold = confidence_threshold
        self._stop_token_ids = stop_token_ids
        self._cache = DynamicCache()
        self._state = state

    def run(self, prompt: list[int], max_new_tokens: int) -> None:
        limit = len(prompt) + max_new_tokens
        anchor = self._prefill(prompt)
        start = len(prompt)  # position of the anchor, the newest committed token
        ended = anchor in self._stop_token_ids
        while start < limit and not ended:
            committed, ended = self._round(self.tokens[-1])
            self.tokens += committed
            start += len(committed)
        del self.tokens[limit:]

    def _prefill(self, prompt: list[int]) -> int:
        logits = _forward(self._target_model, prompt, self._cache, last_row_only=True)[-1]
        if self._generator is None:
            first = int(logits.argmax())
        else:
            first = draw(distribution(logits, self._temperature), self._generator)
        self.tokens = [*prompt, first]
        self._observe(self.tokens[1:])
        return first

    def _round(self, anchor: int) -> tuple[list[int], bool]:
        """Draft, verify, record. Returns the committed tokens and whether the row has ended."""
        proposal = self._drafter.propose(
            self._state,
            anchor,
            temperature=self._temperature,
            generator=self._generator,
            confidence_threshold=self._confidence_threshold,
        )
        drafts = proposal.token_ids.tolist()
        verdict = self._verify(anchor, drafts, proposal)
        accepted = drafts[: verdict.num_accepted]
        for index, token in enumerate(accepted):
            if token in self._stop_token_ids:
                self.rounds.append(_Round(accepted=index + 1, proposed=index + 1, accepted_drafts=index + 1))
                return accepted[: index + 1], True
        committed = [*accepted, verdict.next_token]
        self.rounds.append(_Round(accepted=len(committed), proposed=len(drafts), accepted_drafts=len(accepted)))
        num_rejected = len(drafts) - len(accepted)
        if num_rejected:
            self._cache.crop(-num_rejected)
        self._observe(committed)
        return committed, verdict.next_token in self._stop_token_ids

    def _verify(self, anchor: int, drafts: list[int], proposal: Proposal) -> Verdict:
        logits = _forward(self._target_model, [anchor, *drafts], self._cache, last_row_only=False)
        if self._generator is None:
            return verify_greedy(drafts, logits.argmax(dim=-1).tolist())
        assert proposal.probabilities is not None, "a drafter returns probabilities above temperature 0"
        p_target = distribution(logits, self._temperature)
        return verify_sampled(proposal.token_ids, proposal.probabilities, p_target, self._generator)

    def _observe(self, next_tokens: list[int]) -> None:
        """Give the drafter the first rows of the last forward, as many as there are tokens that follow them."""
        features = torch.cat([output[0, : len(next_tokens)] for output in self._tap.take()], dim=-1)
        self._drafter.observe(self._state, features, torch.tensor(next_tokens, device=features.device))


def _forward(model: nn.Module, tokens: list[int], cache: DynamicCache, *, last_row_only: bool) -> Tensor:
    """One target forward over new tokens; grows the cache. Returns logits [1 or T, V]."""
    device = next(model.parameters()).device
    ids = torch.tensor([tokens], device=device)
    # As a tensor: for a number, layers that share keys with earlier ones compute no other rows, and the tap sees none.
    last_row = torch.tensor([len(tokens) - 1], device=device)
    output = model(
        input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=last_row if last_row_only else 0
    )
    logits: Tensor = output.logits[0]
    return logits


def _prompt_tokens(prompt: Tensor | Sequence[int], row: int) -> list[int]:
    tokens: list[int] = torch.as_tensor(prompt).tolist()
    if not tokens:
        raise ValueError(f"prompt {row} is empty: decoding needs at least one token")
    return tokens
