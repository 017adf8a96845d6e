"""What one evaluation found. No torch."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from evaluation import metrics
from services.contracts import Record


class Divergence(Record):
    """The first token at which speculative greedy output left the target's own."""

    sample: int
    position: int
    """Counted from the first new token."""
    target_token: int | None
    """None if the target had already ended."""
    our_token: int | None
    """None if speculative decoding had already ended."""
    top2_gap: float
    """Between the target's two largest logits there."""
    token_gap: float | None
    """Between the target's logits of the two tokens; None if one side had ended."""
    within_rounding: bool
    """Whether the gap is so small that the target's dtype cannot tell the tokens apart; never true in float32."""

    @property
    def place(self) -> str:
        """Where it is, and how sure the target was there, in words."""
        return (
            f"at new token {self.position}, where the target's two largest logits are {self.top2_gap:.3g} apart"
            f"{', a tie as its dtype rounds' if self.within_rounding else ''}"
        )


class DomainFigures(Record):
    """Figures of the prompts of one domain; None where no round was decoded."""

    num_samples: int
    accepted_length: float | None
    interval: tuple[float, float] | None
    accept_rate: tuple[float, ...]


class Report(Record):
    """Figures of one drafter checkpoint on the held-out prompts (specs/evaluation.md, "Figures")."""

    label: str
    checkpoint: str
    temperature: float
    accepted_length: float
    """τ, bonus token included."""
    interval: tuple[float, float]
    """95 % bootstrap interval of τ over samples."""
    accept_rate: tuple[float, ...]
    """accept_rate@k by slot."""
    cond_accept_rate: tuple[float | None, ...]
    """cond_accept_rate@k by slot; None where no round got that far."""
    draft_tokens_per_proposal: float
    verify_rate: float
    num_samples: int
    num_rounds: int
    num_tokens: int
    """New tokens of all samples."""
    seconds: float
    """Wall time of speculative decoding alone: no loading, no reference output."""
    lossless: bool | None
    """Whether greedy output equals the target's own (float32: token for token); None above temperature 0."""
    first_divergence: Divergence | None
    num_skipped: int = 0
    """Prompts left out because the target's context is shorter."""
    domains: dict[str, DomainFigures] = Field({})
    """The same by domain of the prompts."""
    samples: tuple[tuple[int, int], ...] = ()
    """Committed tokens and rounds of each prompt, in their order."""
    weights: str = ""
    """`weights_digest` of the checkpoint: what was measured, whatever its folder holds later."""
    began_s: float = 0.0
    """Wall clock when the evaluator was asked."""

    def accepted_length_of_first(self, num_samples: int) -> float:
        """τ over the first prompts alone, to compare it with a report on fewer prompts; all if it has no more."""
        first = self.samples[:num_samples]
        num_rounds = sum(rounds for _, rounds in first)
        return sum(tokens for tokens, _ in first) / num_rounds if num_rounds else self.accepted_length


def summarize(
    accepted_lengths: metrics.Rounds,
    proposal_lengths: metrics.Rounds,
    accepted_draft_lengths: metrics.Rounds,
    *,
    label: str,
    checkpoint: str,
    temperature: float,
    seed: int,
    num_tokens: int,
    seconds: float,
    divergences: Sequence[Divergence] | None,
    num_skipped: int = 0,
    domains: Sequence[str] = (),
) -> Report:
    """Put the figures of one evaluation together.

    Args:
        divergences: The first divergence of each sample that has one; None if the output was not checked.
        num_skipped: Prompts that were left out.
        domains: Of each sample; none leaves figures by domain out.

    Raises:
        ValueError: There was no round.
    """
    worst_first = sorted(divergences or (), key=lambda found: (found.within_rounding, found.sample))
    return Report(
        label=label,
        checkpoint=checkpoint,
        temperature=temperature,
        accepted_length=metrics.accepted_length(accepted_lengths),
        interval=metrics.bootstrap_interval(accepted_lengths, seed=seed),
        accept_rate=tuple(metrics.accept_rate(accepted_draft_lengths, proposal_lengths)),
        cond_accept_rate=tuple(metrics.cond_accept_rate(accepted_draft_lengths, proposal_lengths)),
        draft_tokens_per_proposal=metrics.draft_tokens_per_proposal(proposal_lengths),
        verify_rate=metrics.verify_rate(accepted_lengths, proposal_lengths),
        num_samples=len(accepted_lengths),
        num_rounds=sum(len(rounds) for rounds in accepted_lengths),
        num_tokens=num_tokens,
        seconds=seconds,
        lossless=None if divergences is None else all(found.within_rounding for found in divergences),
        first_divergence=worst_first[0] if worst_first else None,
        num_skipped=num_skipped,
        domains={
            domain: _figures_of(
                *(
                    [rounds for rounds, other in zip(lengths, domains, strict=True) if other == domain]
                    for lengths in (accepted_lengths, proposal_lengths, accepted_draft_lengths)
                ),
                seed=seed,
            )
            for domain in sorted(set(domains))
        },
        samples=tuple((sum(rounds), len(rounds)) for rounds in accepted_lengths),
    )


def _figures_of(
    accepted_lengths: metrics.Rounds,
    proposal_lengths: metrics.Rounds,
    accepted_draft_lengths: metrics.Rounds,
    *,
    seed: int,
) -> DomainFigures:
    has_rounds = any(accepted_lengths)
    return DomainFigures(
        num_samples=len(accepted_lengths),
        accepted_length=metrics.accepted_length(accepted_lengths) if has_rounds else None,
        interval=metrics.bootstrap_interval(accepted_lengths, seed=seed) if has_rounds else None,
        accept_rate=tuple(metrics.accept_rate(accepted_draft_lengths, proposal_lengths)),
    )
