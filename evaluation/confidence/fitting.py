"""Sequential Temperature Scaling: one temperature a slot, fitted left to right. No torch.

Slot k's temperature is the one of a grid that minimises the ECE of the cumulative product
Π_{i≤k} σ(logit_i / T_i), with the temperatures of the slots before it as they were fitted. A temperature above 1 makes
confidences less extreme, one below 1 more.
"""

from __future__ import annotations

import numpy as np

from evaluation.confidence.calibration import expected_calibration_error
from evaluation.confidence.rounds import Rounds, clamped, confidences

GRID = tuple(float(temperature) for temperature in np.geomspace(0.05, 20, 481))
"""Temperatures that are tried: 1 is among them, and neighbours lie 1.3 % apart."""


def fit_temperatures(rounds: Rounds) -> list[float]:
    """One temperature a slot, from rounds decoded at threshold 0.

    Of temperatures with equal ECE the one nearest to 1 is taken. A slot keeps its logits, at temperature 1, where no
    round reaches it, or where all prefixes survived or none did: its temperature could only run to an end of the grid.
    """
    order = sorted(GRID, key=lambda temperature: abs(np.log(temperature)))
    before = np.ones(rounds.num_rounds)
    fitted = []
    for slot in range(rounds.num_drafts):
        logits = rounds.logits[:, slot]
        judged = rounds.judged(slot)
        survived = rounds.survived(slot)[judged]
        best, least = 1.0, np.inf
        for temperature in order if 0 < survived.sum() < len(survived) else ():
            products = before[judged] * confidences(logits[judged] / temperature)
            error = expected_calibration_error(clamped(products), survived)
            if error < least:
                best, least = float(temperature), error
        fitted.append(best)
        before = before * confidences(logits / best)
    return fitted
