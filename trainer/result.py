"""What a trainer rank ends with."""

from __future__ import annotations

from services.contracts import Record


class TrainResult(Record):
    """Figures of one attempt of a run; the same on every rank."""

    first_step: int
    """First optimizer step of this attempt, counted from 1 over the whole run."""
    steps: int
    """Optimizer steps done in all, those of earlier attempts included."""
    final_loss: float | None
    """Mean loss of the last steps; None where this attempt made no step."""
    tokens: int
    """Tokens trained on in this attempt, all ranks together."""
    first_fill_s: float
    """Seconds that the first step waited for the buffer to fill."""
    wait_s: float
    """Seconds that all later steps waited for micro-batches; the slowest rank of each step counts."""
    step_s: float
    """Seconds that all steps after the first took, waiting included, checkpoints not."""

    @property
    def wait_fraction(self) -> float | None:
        """Part of the time after the first fill that was spent waiting; None before there is any."""
        return self.wait_s / self.step_s if self.step_s > 0 else None
