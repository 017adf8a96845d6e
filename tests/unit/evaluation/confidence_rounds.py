"""Rounds of decoding for tests of confidence figures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from evaluation.confidence.rounds import Rounds


@dataclass
class Decoded:
    """A decoded sample, with what is read of its record."""

    accepted_lengths: Sequence[int]
    proposal_lengths: Sequence[int]
    accepted_draft_lengths: Sequence[int]
    confidence: Sequence[Sequence[float]] | None


def logit(probability: float) -> float:
    return math.log(probability / (1 - probability))


def rounds_of(
    confidences: Sequence[Sequence[float]], accepted: Sequence[int], proposed: Sequence[int] | None = None
) -> Rounds:
    """Rounds from the confidences (not logits) of each draft; all drafts are judged if nothing else is said."""
    logits = np.array([[logit(value) for value in row] for row in confidences])
    lengths = np.full(len(accepted), logits.shape[1]) if proposed is None else np.array(proposed)
    kept = np.array(accepted)
    return Rounds(logits, lengths, kept, kept + 1)


def simulated(true_logits: np.ndarray, *, temperatures: Sequence[float], seed: int) -> Rounds:
    """Rounds whose drafts are accepted with σ(true logit), while the head said true logit · temperature."""
    uniforms = np.random.default_rng(seed).random(true_logits.shape)
    stays = uniforms < 1 / (1 + np.exp(-true_logits))
    accepted = np.cumprod(stays, axis=1).sum(axis=1)
    proposed = np.full(len(accepted), true_logits.shape[1])
    return Rounds(true_logits * np.asarray(temperatures), proposed, accepted, accepted + 1)
