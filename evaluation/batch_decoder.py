"""Decoding many sequences at once: every round is one proposal and one target forward pass for all of them.

A round: the drafter proposes up to γ tokens after each sequence's anchor, one target forward pass scores anchors and
drafts together, the acceptance rule keeps a prefix of each and adds one token, and the drafter is given the features of
what stays. Sequences that have ended leave, others take their place; each one's result is the one that it has alone,
because masks hide the others and its random numbers are its own (specs "Decoding, all drafters, round by round").
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from types import TracebackType
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from drafters.drafter import Drafter, DraftState, Proposal
from drafters.sampling import draw_tokens
from evaluation.accept import Verdicts, distribution, is_greedy, verify_greedy, verify_sampled
from evaluation.ragged_target import PREFILL_TOKENS, RaggedTarget
from evaluation.timing import Phase, PhaseClock

MOST_PADDED = 1.25
"""The longest prompt of a prefill over its shortest: padding costs as much as tokens, a pass more costs less."""

Cut = Callable[[Proposal], Tensor]
"""Says how many drafts of each sequence are verified, [B] int64; more than there are means all."""


class Round(NamedTuple):
    """What one round of one sequence recorded."""

    committed: int
    """Tokens that it committed, the bonus token included."""
    proposed: int
    """Tokens that were verified; in a round that a drafted stop token ended, those up to and including it."""
    accepted: int
    """Drafts that it kept, the bonus token excluded."""


@dataclass
class Row:
    """One sequence being decoded.

    Attributes:
        index: Which prompt it is.
        tokens: The prompt; new tokens are added to it.
        seed: Of its random numbers.
        num_prompt: Length of the prompt.
        rounds: One entry a round.
        has_ended: After a stop token or at the limit.
    """

    index: int
    tokens: list[int]
    seed: int = 0
    rounds: list[Round] = field(default_factory=list)
    has_ended: bool = False

    def __post_init__(self) -> None:
        self.num_prompt = len(self.tokens)
        self._generator = torch.Generator().manual_seed(self.seed)

    def uniforms(self, count: int) -> Tensor:
        """Its next random numbers, [count] float64 in [0, 1), on the CPU: the same whatever the target runs on."""
        return torch.rand(count, dtype=torch.float64, generator=self._generator)


class RoundRecord(NamedTuple):
    """What a round was for all sequences, for those that watch (`BatchDecoder`'s ``on_round``)."""

    rows: list[Row]
    """The sequences, in the order of the tensors; the newest entry of each one's rounds is of this round."""
    proposal: Proposal
    """What was drafted, before any cut."""


def cut_below(threshold: float, temperatures: Sequence[float] | None = None) -> Cut | None:
    """Cuts a proposal before the first token that the drafter is less sure of; none at 0, or without confidences.

    Args:
        threshold: Of σ(confidence logit / temperature of the slot).
        temperatures: One a slot, as `evaluation.confidence` fits them; None: all 1.
    """
    if threshold <= 0:
        return None

    def cut(proposal: Proposal) -> Tensor:
        if proposal.confidence is None:
            return proposal.token_ids.new_full((len(proposal.token_ids),), proposal.token_ids.shape[1])
        logits = proposal.confidence
        if temperatures is not None:
            logits = logits / logits.new_tensor(temperatures)
        return (logits.sigmoid() >= threshold).long().cumprod(dim=1).sum(dim=1)

    return cut


class BatchDecoder:
    """Decodes prompts with a target, and with what a drafter proposes if there is one. A context manager.

    Args:
        target_model: A transformers causal LM, in evaluation mode.
        drafter: On the target's device; None decodes plainly, one token a sequence and round.
        max_rows: Most sequences at once.
        max_new_tokens: Most tokens that a sequence grows by.
        temperature: Below 1e-5 is greedy.
        stop_token_ids: A sequence ends after the first of these.
        cut: How many drafts of a proposal are verified; None: all.
        on_round: Called after each round.
        clock: Times the phases.

    Raises:
        ValueError: The target has layers or an attention that cannot decode a batch.
    """

    def __init__(
        self,
        target_model: nn.Module,
        drafter: Drafter | None,
        *,
        max_rows: int,
        max_new_tokens: int,
        temperature: float = 0.0,
        stop_token_ids: Iterable[int] = (),
        cut: Cut | None = None,
        on_round: Callable[[RoundRecord], None] | None = None,
        clock: PhaseClock | None = None,
    ) -> None:
        self._drafter = drafter
        self._max_rows = max_rows
        self._max_new_tokens = max_new_tokens
        self._temperature = temperature
        self._stop_token_ids = frozenset(stop_token_ids)
        self._cut = cut
        self._on_round = on_round
        self._clock = clock
        self._num_drafts = 0 if drafter is None else drafter.settings.num_drafts
        layer_ids = None if drafter is None else drafter.settings.target_layer_ids
        self._target = RaggedTarget(target_model, max_rows, layer_ids)
        self._state: DraftState | None = None
        if drafter is not None:
            self._state = drafter.start_drafting(max_rows, self._stop_token_ids)
        self._rows: list[Row] = []

    def __enter__(self) -> Self:
        self._target.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._target.__exit__(kind, error, trace)

    @property
    def rows(self) -> Sequence[Row]:
        """The sequences being decoded."""
        return self._rows

    def run(self, prompts: Sequence[Sequence[int]], seed: int = 0) -> list[Row]:
        """Decode prompts to their ends; one that ends makes room for the next. Prompt i is seeded seed + i.

        Returns:
            One entry a prompt, in their order.
        """
        waiting = deque(Row(index, list(prompt), seed + index) for index, prompt in enumerate(prompts))
        ended: list[Row] = []
        with self._clock.running() if self._clock else nullcontext():
            while waiting or self._rows:
                room = self._max_rows - len(self._rows)
                if waiting and room:
                    ended += self.add([waiting.popleft() for _ in range(min(room, len(waiting)))])
                else:
                    ended += self.round()
        return sorted(ended, key=lambda row: row.index)

    @torch.inference_mode()
    def add(self, rows: Sequence[Row]) -> list[Row]:
        """Prefill the target with prompts, and give each its first token, which belongs to no round.

        Returns:
            Those that have ended with it.
        """
        for group in _prefill_groups(rows):
            first = len(self._rows)
            with self._phase("prefill"):
                logits = self._target.prefill([row.tokens for row in group], first)
            for row, token in zip(group, self._choose(logits, group), strict=True):
                row.tokens.append(token)
                row.has_ended = token in self._stop_token_ids or self._is_full(row)
            self._rows += group
            if self._state is not None:
                self._state.open([row.seed for row in group])
            self._observe([row.tokens[1:] for row in group], first)
        return self._drop_ended()

    @torch.inference_mode()
    def round(self) -> list[Row]:
        """One proposal and one verification for every sequence.

        Returns:
            Those that have ended with it.
        """
        rows = list(self._rows)
        anchors = torch.tensor([row.tokens[-1] for row in rows], device=self._target.device)
        uniforms = self._uniforms(rows, 2 * self._num_drafts + 1)
        whole = self._propose(anchors, uniforms)
        proposal = whole.shortened(self._cut(whole)) if self._cut else whole
        with self._phase("verify"):
            token_ids = torch.cat([anchors[:, None], proposal.token_ids], dim=1)
            logits = self._target.extend(token_ids, [len(row.tokens) - 1 for row in rows])
        self._observe(self._commit(proposal, self._judge(proposal, logits, uniforms)), 0)
        if self._on_round is not None:
            self._on_round(RoundRecord(rows, whole))
        return self._drop_ended()

    def _propose(self, anchors: Tensor, uniforms: Tensor | None) -> Proposal:
        if self._drafter is None:
            return Proposal(anchors.new_empty(len(anchors), 0))
        with self._phase("draft"):
            return self._drafter.propose(self._state, anchors, temperature=self._temperature, uniforms=uniforms)

    def _judge(self, proposal: Proposal, logits: Tensor, uniforms: Tensor | None) -> Verdicts:
        if uniforms is None:
            return verify_greedy(proposal, logits.argmax(dim=-1))
        # A sequence uses its numbers alike whatever is drafted for others: γ to draft, γ to accept, and the last.
        accepting = uniforms[:, self._num_drafts :][:, : proposal.token_ids.shape[1]]
        p_target = distribution(logits, self._temperature)
        return verify_sampled(proposal, p_target, torch.cat([accepting, uniforms[:, -1:]], dim=1))

    def _commit(self, proposal: Proposal, verdicts: Verdicts) -> list[list[int]]:
        """Add to each sequence what was decided; returns the tokens."""
        num_drafts = proposal.token_ids.shape[1]
        lengths = proposal.lengths
        if lengths is None:
            lengths = torch.full_like(verdicts.num_accepted, num_drafts)
        columns = [verdicts.num_accepted[:, None], verdicts.next_tokens[:, None], lengths[:, None], proposal.token_ids]
        committed = []
        for row, decided in zip(self._rows, torch.cat(columns, dim=1).tolist(), strict=True):
            num_accepted, next_token, length, *drafts = decided
            kept = drafts[:num_accepted]
            stop = next((index for index, token in enumerate(kept) if token in self._stop_token_ids), None)
            if stop is not None:
                tokens = kept[: stop + 1]
                row.rounds.append(Round(committed=stop + 1, proposed=stop + 1, accepted=stop + 1))
            else:
                tokens = [*kept, next_token]
                row.rounds.append(Round(committed=len(tokens), proposed=length, accepted=num_accepted))
            row.tokens += tokens
            row.has_ended = tokens[-1] in self._stop_token_ids or self._is_full(row)
            committed.append(tokens)
        return committed

    def _observe(self, next_tokens: list[list[int]], first: int) -> None:
        """Give the drafter the first rows of the last forward pass, as many as there are tokens that follow them."""
        if self._drafter is None:
            return
        with self._phase("draft"):
            counts = [len(tokens) for tokens in next_tokens]
            most = max(counts)
            padded = [tokens + [0] * (most - len(tokens)) for tokens in next_tokens]
            next_ids = torch.tensor(padded, device=self._target.device)
            self._drafter.observe(self._state, self._target.features(most), next_ids, counts, first)

    def _choose(self, logits: Tensor, rows: Sequence[Row]) -> list[int]:
        """One token for each row from its logits [b, V]."""
        uniforms = self._uniforms(rows, 1)
        if uniforms is None:
            chosen = logits.argmax(dim=-1)
        else:
            chosen = draw_tokens(distribution(logits, self._temperature), uniforms[:, 0])
        tokens: list[int] = chosen.tolist()
        return tokens

    def _uniforms(self, rows: Sequence[Row], count: int) -> Tensor | None:
        """[b, count] random numbers, each row's own; None when greedy."""
        if is_greedy(self._temperature):
            return None
        return torch.stack([row.uniforms(count) for row in rows]).to(self._target.device)

    def _is_full(self, row: Row) -> bool:
        """Whether no round follows. With drafts one more runs when exactly the limit is out."""
        num_new = len(row.tokens) - row.num_prompt
        return num_new > self._max_new_tokens if self._drafter is not None else num_new >= self._max_new_tokens

    def _drop_ended(self) -> list[Row]:
        ended = []
        for place in reversed(range(len(self._rows))):
            row = self._rows[place]
            if row.has_ended:
                del row.tokens[row.num_prompt + self._max_new_tokens :]
                ended.append(row)
                self._target.move(len(self._rows) - 1, place)
                if self._state is not None:
                    self._state.drop(place)
                self._rows[place] = self._rows[-1]
                del self._rows[-1]
        return ended

    def _phase(self, name: Phase) -> AbstractContextManager[None]:
        return self._clock.phase(name) if self._clock else nullcontext()


def _prefill_groups(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows that are prefilled together: of like lengths, so that little is padded, and not too many tokens."""
    groups: list[list[Row]] = []
    for row in sorted(rows, key=lambda row: row.num_prompt):
        group = groups[-1] if groups else []
        fits = (len(group) + 1) * row.num_prompt <= PREFILL_TOKENS
        if group and fits and row.num_prompt <= MOST_PADDED * group[0].num_prompt:
            group.append(row)
        else:
            groups.append([row])
    return groups
