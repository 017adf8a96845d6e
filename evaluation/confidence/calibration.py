"""How far predicted survival is from what happened, slot by slot (docs/confidence.md has the formulas). No torch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from evaluation.confidence.rounds import Flags, Floats, Integers, Rounds, clamped, survival
from services.contracts import Record

ECE_BINS = 20
AUROC_BINS = 1000


class Bin(Record):
    """Predictions between two twentieths."""

    count: int
    predicted: float
    """Their mean."""
    observed: float
    """The part of their prefixes that survived."""


class SlotCalibration(Record):
    """Figures of one slot: predicted survival of the prefix that ends with it, against whether it survived."""

    position: int
    """Counted from 0."""
    num_rounds: int
    """Rounds whose recorded proposal reaches the slot."""
    predicted: float
    """Mean predicted survival."""
    observed: float
    """The part that survived."""
    ece: float
    auroc: float | None
    """None where all survived or none did: then there is nothing to tell apart."""
    brier: float
    bins: tuple[Bin | None, ...]
    """The reliability diagram: `ECE_BINS` bins from 0 to 1, None where there is no prediction."""


def calibration(rounds: Rounds, temperatures: Sequence[float] | None = None) -> list[SlotCalibration]:
    """Figures of every slot that some round's recorded proposal reaches.

    Args:
        rounds: Decoded at threshold 0.
        temperatures: One a slot; None: the head's logits as they are.
    """
    probabilities = clamped(survival(rounds.logits, temperatures))
    slots = []
    for slot in range(rounds.num_drafts):
        judged = rounds.judged(slot)
        if judged.any():
            slots.append(slot_calibration(slot, probabilities[judged, slot], rounds.survived(slot)[judged]))
    return slots


def slot_calibration(position: int, probabilities: Floats, survived: Flags) -> SlotCalibration:
    """Figures of one slot from at least one prediction: [N] each."""
    bins = reliability(probabilities, survived)
    return SlotCalibration(
        position=position,
        num_rounds=len(probabilities),
        predicted=float(probabilities.mean()),
        observed=float(survived.mean()),
        ece=expected_calibration_error(probabilities, survived),
        auroc=auroc(probabilities, survived),
        brier=brier(probabilities, survived),
        bins=tuple(bins),
    )


def expected_calibration_error(probabilities: Floats, survived: Flags, num_bins: int = ECE_BINS) -> float:
    """ECE = Σ_bins (n_bin / N) · |mean prediction − part that survived|, over bins of equal width."""
    where = bin_of(probabilities, num_bins)
    predicted = np.bincount(where, weights=probabilities, minlength=num_bins)
    observed = np.bincount(where, weights=survived, minlength=num_bins)
    return float(np.abs(predicted - observed).sum() / len(probabilities))


def auroc(probabilities: Floats, survived: Flags, num_bins: int = AUROC_BINS) -> float | None:
    """The probability that a prefix that survived was predicted higher than one that did not, ties counting half.

    Predictions in one of the bins of equal width are ties. None where all survived, or none.
    """
    where = bin_of(probabilities, num_bins)
    positives = np.bincount(where[survived], minlength=num_bins)
    negatives = np.bincount(where[~survived], minlength=num_bins)
    pairs = int(positives.sum()) * int(negatives.sum())
    if not pairs:
        return None
    below = np.cumsum(negatives) - negatives
    return float((positives * (below + negatives / 2)).sum() / pairs)


def brier(probabilities: Floats, survived: Flags) -> float:
    """Mean of (prediction − outcome)², the outcome 0 or 1."""
    return float(np.square(probabilities - survived).mean())


def reliability(probabilities: Floats, survived: Flags, num_bins: int = ECE_BINS) -> list[Bin | None]:
    """The bins of a reliability diagram."""
    where = bin_of(probabilities, num_bins)
    bins: list[Bin | None] = []
    for number in range(num_bins):
        inside = where == number
        count = int(inside.sum())
        if count:
            bins.append(
                Bin(
                    count=count,
                    predicted=float(probabilities[inside].mean()),
                    observed=float(survived[inside].mean()),
                )
            )
        else:
            bins.append(None)
    return bins


def bin_of(probabilities: Floats, num_bins: int) -> Integers:
    """[N] bins of equal width, closed to the left; 1 lies in the last."""
    numbers: Integers = np.minimum((probabilities * num_bins).astype(np.int64), num_bins - 1)
    return numbers
