"""Figures of speculative decoding, from what each round recorded. No torch.

Arguments are one list a sample with one number a round, as `SpeculativeOutput` has them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain

import numpy as np

NUM_RESAMPLES = 10_000
"""Bootstrap resamples: the interval's ends then move by less than 1 % of its width from seed to seed."""

MOST_DRAWS = 2_000_000
"""Samples drawn at once: thousands of samples need no more memory than few."""

Rounds = Sequence[Sequence[int]]


def accepted_length(accepted_lengths: Rounds) -> float:
    """τ = Σ committed tokens / rounds.

    Raises:
        ValueError: There was no round.
    """
    return _mean(_flat(accepted_lengths), "accepted length")


def draft_tokens_per_proposal(proposal_lengths: Rounds) -> float:
    """Σ proposal lengths / rounds.

    Raises:
        ValueError: There was no round.
    """
    return _mean(_flat(proposal_lengths), "proposal length")


def verify_rate(accepted_lengths: Rounds, proposal_lengths: Rounds) -> float:
    """Σ accepted length / Σ (proposal length + 1): the part of the verified rows that became output.

    Raises:
        ValueError: There was no round.
    """
    proposed = _flat(proposal_lengths)
    if not proposed:
        raise ValueError("no round was decoded, so there is no verify rate")
    return sum(_flat(accepted_lengths)) / (sum(proposed) + len(proposed))


def accept_rate(accepted_draft_lengths: Rounds, proposal_lengths: Rounds) -> list[float]:
    """accept_rate@k = rounds with more than k accepted drafts / rounds with more than k drafts.

    Returns:
        One rate a slot, as many as the longest proposal.
    """
    accepted, proposed = _flat(accepted_draft_lengths), _flat(proposal_lengths)
    return [_above(accepted, k) / _above(proposed, k) for k in range(max(proposed, default=0))]


def cond_accept_rate(accepted_draft_lengths: Rounds, proposal_lengths: Rounds) -> list[float | None]:
    """cond_accept_rate@k = accepted at k / rounds whose proposal reaches k with all earlier slots accepted.

    Returns:
        One rate a slot, as many as the longest proposal; None where no round got that far.
    """
    accepted, proposed = _flat(accepted_draft_lengths), _flat(proposal_lengths)
    rates: list[float | None] = []
    for k in range(max(proposed, default=0)):
        reached = sum(length > k and kept >= k for kept, length in zip(accepted, proposed, strict=True))
        rates.append(_above(accepted, k) / reached if reached else None)
    return rates


def bootstrap_interval(accepted_lengths: Rounds, *, seed: int, level: float = 0.95) -> tuple[float, float]:
    """Percentile bootstrap of τ over samples: whole samples are drawn with replacement, τ of each draw is Σ / Σ.

    Samples without a round carry no information about τ and are left out.

    Returns:
        (low, high).

    Raises:
        ValueError: There was no round.
    """
    tokens = np.array([sum(rounds) for rounds in accepted_lengths if rounds])
    counts = np.array([len(rounds) for rounds in accepted_lengths if rounds])
    if not len(counts):
        raise ValueError("no round was decoded, so τ has no interval")
    generator = np.random.default_rng(seed)
    size = max(1, MOST_DRAWS // len(counts))
    resampled = []
    for first in range(0, NUM_RESAMPLES, size):
        draws = generator.integers(0, len(counts), size=(min(size, NUM_RESAMPLES - first), len(counts)))
        resampled.append(tokens[draws].sum(axis=1) / counts[draws].sum(axis=1))
    low, high = np.quantile(np.concatenate(resampled), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _flat(rounds: Rounds) -> list[int]:
    return list(chain.from_iterable(rounds))


def _above(lengths: Iterable[int], k: int) -> int:
    return sum(length > k for length in lengths)


def _mean(values: Sequence[int], what: str) -> float:
    if not values:
        raise ValueError(f"no round was decoded, so there is no {what}")
    return sum(values) / len(values)
