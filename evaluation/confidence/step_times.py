"""What a decoding step takes by the number of tokens in it, as measured, and what follows for throughput. No torch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from evaluation.confidence.rounds import Integers, Rounds, survival
from evaluation.confidence.scheduler import schedule
from services.contracts import Record

SHUFFLE_SEED = 980406
"""Puts rounds together as requests of one step."""


class StepTimes(Record):
    """Measured seconds of the parts of a step with R requests."""

    num_requests: int
    """R."""
    draft_s: float
    """The drafter's part: taking in what was verified, and a proposal. It drafts whole blocks, however few are
    verified."""
    verify_s: tuple[float, ...]
    """The target's forward pass over 1, 2, … tokens of each request."""

    def step_s(self, num_tokens: float) -> float:
        """Seconds of a step whose target pass has B tokens; between measured B on a straight line."""
        measured = self.num_requests * np.arange(1, len(self.verify_s) + 1)
        return self.draft_s + float(np.interp(num_tokens, measured, self.verify_s))

    def steps_per_s(self, num_tokens: int) -> float:
        """SPS(B)."""
        return 1 / self.step_s(num_tokens)


class Throughput(Record):
    """Tokens a second at one concurrency, replayed from recorded rounds with measured step times."""

    num_requests: int
    fixed: tuple[float, ...]
    """Verifying 0, 1, … γ drafts of every request."""
    scheduled: float
    scheduled_drafts: float
    """Mean drafts that the scheduler has verified of a request."""

    @property
    def best_fixed(self) -> int:
        """The fixed length that gives most."""
        return int(np.argmax(self.fixed))


def replay(rounds: Rounds, times: StepTimes, temperatures: Sequence[float] | None = None) -> Throughput:
    """What rounds would have given, R at a time, with fixed lengths and with scheduled ones.

    Which drafts are accepted is as it was recorded, cut where fewer are verified. Rounds are put together at random;
    those that fill no step of R are left out, and where there are fewer than R they are taken several times.

    Args:
        rounds: Decoded at threshold 0.
        times: Of R requests; for γ + 1 tokens a request.
        temperatures: Of the confidences that are scheduled by; None: the head's logits as they are.
    """
    num_requests, num_drafts = times.num_requests, rounds.num_drafts
    order = np.random.default_rng(SHUFFLE_SEED).permutation(max(rounds.num_rounds, num_requests)) % rounds.num_rounds
    num_steps = len(order) // num_requests
    rounds = rounds.take(order[: num_steps * num_requests])
    steps = survival(rounds.logits, temperatures).reshape(num_steps, num_requests, num_drafts)
    lengths = np.array([schedule(step, times.steps_per_s) for step in steps.tolist()])
    return Throughput(
        num_requests=num_requests,
        fixed=tuple(_tokens_per_s(rounds, times, np.full_like(lengths, fixed)) for fixed in range(num_drafts + 1)),
        scheduled=_tokens_per_s(rounds, times, lengths),
        scheduled_drafts=float(lengths.mean()),
    )


def _tokens_per_s(rounds: Rounds, times: StepTimes, lengths: Integers) -> float:
    """Tokens a second of S steps of R rounds, [S · R], with lengths [S, R]."""
    num_tokens = int(rounds.committed_if_cut(lengths.ravel()).sum())
    return num_tokens / sum(times.step_s(times.num_requests + drafts) for drafts in lengths.sum(axis=1).tolist())
