"""Decoded rounds as arrays: what the drafter thought of each draft, and what became of it. No torch.

N rounds, γ drafts a proposal. All rounds are of decoding at threshold 0, where every draft is verified.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Flags = NDArray[np.bool_]

SMALLEST_PROBABILITY = 1e-8
"""Where survival is held against outcomes it is kept this far from 0 and 1."""


class DecodedSample(Protocol):
    """What is read of one sample's record: one entry a round."""

    @property
    def accepted_lengths(self) -> Sequence[int]:
        """Tokens committed, the bonus token included."""

    @property
    def proposal_lengths(self) -> Sequence[int]:
        """Drafts verified, up to and including a drafted stop token that ended the round."""

    @property
    def accepted_draft_lengths(self) -> Sequence[int]:
        """Drafts kept, the bonus token excluded."""

    @property
    def confidence(self) -> Sequence[Sequence[float]] | None:
        """Logits of the whole proposal."""


@dataclass(frozen=True)
class Rounds:
    """Rounds of several samples.

    Attributes:
        logits: [N, γ] of each draft's acceptance, given that those before it are.
        proposed: [N] recorded proposal lengths: later slots were not judged.
        accepted: [N] drafts kept.
        committed: [N] tokens committed, the bonus token included.
    """

    logits: Floats
    proposed: Integers
    accepted: Integers
    committed: Integers

    @classmethod
    def of_samples(cls, samples: Sequence[DecodedSample]) -> Rounds:
        """Put the rounds of samples together, in their order.

        Raises:
            ValueError: There is no round, or rounds without confidences.
        """
        logits: list[Sequence[float]] = []
        proposed: list[int] = []
        accepted: list[int] = []
        committed: list[int] = []
        for sample in samples:
            if not sample.proposal_lengths:
                continue
            if sample.confidence is None:
                raise ValueError("rounds without confidences: the drafter that decoded them has no confidence head")
            logits += sample.confidence
            proposed += sample.proposal_lengths
            accepted += sample.accepted_draft_lengths
            committed += sample.accepted_lengths
        if not proposed:
            raise ValueError("no round was decoded: every sample ended at its first token")
        return cls(
            np.array(logits, dtype=np.float64),
            np.array(proposed, dtype=np.int64),
            np.array(accepted, dtype=np.int64),
            np.array(committed, dtype=np.int64),
        )

    def __post_init__(self) -> None:
        count = len(self.proposed)
        assert self.logits.ndim == 2, f"logits are [N, γ], not {self.logits.shape}"
        assert len(self.logits) == len(self.accepted) == len(self.committed) == count, "one entry a round"

    @property
    def num_rounds(self) -> int:
        """N."""
        return len(self.proposed)

    @property
    def num_drafts(self) -> int:
        """γ."""
        return self.logits.shape[1]

    def judged(self, slot: int) -> Flags:
        """[N] whether a slot, counted from 0, lies below the recorded proposal length."""
        flags: Flags = self.proposed > slot
        return flags

    def survived(self, slot: int) -> Flags:
        """[N] whether the prefix that ends with a slot was accepted whole."""
        flags: Flags = self.accepted > slot
        return flags

    def take(self, which: Integers) -> Rounds:
        """Some of the rounds, in this order; one may come several times."""
        return Rounds(self.logits[which], self.proposed[which], self.accepted[which], self.committed[which])

    def committed_if_cut(self, lengths: Integers) -> Integers:
        """[N] tokens that each round would have committed with no more than so many drafts verified, [N].

        Drafts are judged left to right, so those that stay have the verdict that they had.
        """
        tokens: Integers = np.minimum(self.committed, np.minimum(self.accepted, lengths) + 1)
        return tokens


def confidences(logits: Floats, temperatures: Sequence[float] | None = None) -> Floats:
    """σ(logit / temperature of the slot): [N, γ] → [N, γ] probabilities of acceptance, given all earlier drafts'."""
    scaled = logits / (np.ones(1) if temperatures is None else np.asarray(temperatures, dtype=np.float64))
    # The two halves of 1 / (1 + e^−x), neither of which overflows.
    small: Floats = np.exp(-np.abs(scaled)).astype(np.float64)
    return np.where(scaled >= 0, 1.0, small).astype(np.float64) / (1 + small)


def survival(logits: Floats, temperatures: Sequence[float] | None = None) -> Floats:
    """What the drafter takes for the probability that the prefix up to each slot is accepted whole: the cumulative
    product of its confidences, [N, γ]."""
    products: Floats = np.cumprod(confidences(logits, temperatures), axis=1).astype(np.float64)
    return products


def clamped(probabilities: Floats) -> Floats:
    """Probabilities, kept `SMALLEST_PROBABILITY` from 0 and 1."""
    kept: Floats = np.clip(probabilities, SMALLEST_PROBABILITY, 1 - SMALLEST_PROBABILITY)
    return kept
