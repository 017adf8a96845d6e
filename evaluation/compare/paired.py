"""Whether one drafter's τ is above another's, judged prompt by prompt. No torch.

Prompts differ more from each other than drafters do on one prompt. Intervals of two τ overlap then, even where one
drafter is better on every single prompt. Their difference is therefore resampled as a pair:

    Δ* = Σ_{i ∈ I} a_i / Σ_{i ∈ I} n_i − Σ_{i ∈ I} b_i / Σ_{i ∈ I} m_i

with one draw I of prompts for both; a, b are committed tokens and n, m rounds of a prompt with either drafter.
"""

from __future__ import annotations

import numpy as np

from evaluation.metrics import MOST_DRAWS, NUM_RESAMPLES, Rounds
from services.contracts import Record


class PairedDifference(Record):
    """τ of the first minus τ of the second, over the prompts that both have rounds of.

    Attributes:
        difference: Of the two τ.
        low: Lower end of its bootstrap interval.
        high: Upper end.
        num_prompts: That it is of.
    """

    difference: float
    low: float
    high: float
    num_prompts: int

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low > 0 or self.high < 0


def paired_difference(first: Rounds, second: Rounds, *, seed: int, level: float = 0.95) -> PairedDifference:
    """Percentile bootstrap of the difference of two τ: each resample draws the same prompts for both.

    Args:
        first: Accepted lengths of each prompt's rounds with one drafter.
        second: The same prompts, in the same order, with the other one. A prompt of which either has no round (it
            ended at its first token) tells nothing and is left out.
        seed: Of the resamples.
        level: Part of the resamples that the interval holds.

    Raises:
        ValueError: They are not of as many prompts, or there is no prompt with rounds of both.
    """
    if len(first) != len(second):
        raise ValueError(f"{len(first)} prompts of the one and {len(second)} of the other are no pairs")
    pairs = [(ours, theirs) for ours, theirs in zip(first, second, strict=True) if ours and theirs]
    if not pairs:
        raise ValueError("no prompt has rounds of both, so there is no difference")
    tokens = np.array([[sum(rounds) for rounds in pair] for pair in pairs])
    counts = np.array([[len(rounds) for rounds in pair] for pair in pairs])
    generator = np.random.default_rng(seed)
    size = max(1, MOST_DRAWS // len(pairs))
    resampled = []
    for done in range(0, NUM_RESAMPLES, size):
        draws = generator.integers(0, len(pairs), size=(min(size, NUM_RESAMPLES - done), len(pairs)))
        lengths = tokens[draws].sum(axis=1) / counts[draws].sum(axis=1)
        resampled.append(lengths[:, 0] - lengths[:, 1])
    low, high = np.quantile(np.concatenate(resampled), [(1 - level) / 2, (1 + level) / 2])
    ours, theirs = tokens.sum(axis=0) / counts.sum(axis=0)
    return PairedDifference(difference=float(ours - theirs), low=float(low), high=float(high), num_prompts=len(pairs))
