"""Figures of decoding with a confidence threshold. No torch."""

from __future__ import annotations

from collections.abc import Sequence

from evaluation import metrics
from evaluation.records import SampleRecord
from services.contracts import Record


class SweepPoint(Record):
    """Decoding with one confidence threshold. All rates are over all rounds."""

    threshold: float
    accepted_length: float
    """τ: tokens a round."""
    interval: tuple[float, float]
    """Its 95 % bootstrap interval."""
    acceptance: float | None
    """Accepted drafts / verified drafts; None where nothing was verified."""
    draft_tokens_per_proposal: float
    verify_rate: float
    num_rounds: int


def sweep_point(threshold: float, records: Sequence[SampleRecord], seed: int) -> SweepPoint:
    """Figures of decoding with a threshold.

    Args:
        threshold: Which.
        records: With at least one round.
        seed: Of the bootstrap.
    """
    accepted = [record.accepted_lengths for record in records]
    proposed = [record.proposal_lengths for record in records]
    num_verified = sum(map(sum, proposed))
    num_kept = sum(sum(record.accepted_draft_lengths) for record in records)
    return SweepPoint(
        threshold=threshold,
        accepted_length=metrics.accepted_length(accepted),
        interval=metrics.bootstrap_interval(accepted, seed=seed),
        acceptance=num_kept / num_verified if num_verified else None,
        draft_tokens_per_proposal=metrics.draft_tokens_per_proposal(proposed),
        verify_rate=metrics.verify_rate(accepted, proposed),
        num_rounds=sum(map(len, accepted)),
    )
