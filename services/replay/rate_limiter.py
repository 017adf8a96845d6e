"""The rate limiter: when a table takes another sample and when it gives uses away (specs: "Rate limiter law").

Every sample promises `samples_per_insert` uses, or all that it feeds if those are fewer. With n the uses asked for:

    can_insert(promise)  =  size + 1 ≤ min_size  or  promised + promise − sampled ≤ max_diff
    can_sample(n)        =  size ≥ min_size      and promised − sampled − n ≥ min_diff

These are Reverb's, where size = inserts − deletes and promised − sampled = inserts · samples_per_insert − samples.
Reverb counts both for ever. Here a sample that leaves takes along what it promised and what was sampled of it. As long
as each sample leaves after exactly `samples_per_insert` uses, that is the same number; but a sample that feeds fewer
uses (a resumed run leaves some out) or is freed early (a new trainer group) does not shift the law for the rest of the
run.

`can_insert` counts captures in flight, as if they were here already; `can_sample` does not.

Two things open `can_sample` whatever the law says, because waiting would be for ever: the table is *sealed* (nothing
more will come), or it is *full* (the capture next in line does not fit, so nothing comes before something is sampled).

Why nothing can wait for ever otherwise: say neither an insert of promise ≤ spi nor a lease of n uses is allowed,
nothing is in flight, and the table is not full. Then size ≥ min_size, and promised − sampled ≥ max_diff − spi + 1. That
many uses are ready at least, so with n ≤ max_diff − spi + 1 they suffice; and with n ≤ max_diff − spi + 1 − min_diff
the law allows them. Both make `RateLimiter.largest_lease`; a lease of more is refused.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, Self


class LimiterState(NamedTuple):
    """What the law reads of a table."""

    size: int
    """Committed samples: inserts − deletes."""
    promised: int
    """Uses that these promised."""
    sampled: int
    """Uses of these that were leased and not given back, acked or not."""
    num_inserting: int = 0
    """Captures in flight."""
    promising: int = 0
    """Uses that those will promise."""
    is_full: bool = False
    """The capture next in line does not fit."""
    is_sealed: bool = False
    """Nothing more will come."""


@dataclass(frozen=True)
class RateLimiter:
    """The limits. Without any given, a table takes what fits and gives what it has.

    Attributes:
        min_size: Samples that must be there before uses are given away.
        samples_per_insert: Uses that a sample promises at most.
        min_diff: How low promised − sampled may fall.
        max_diff: How high it may rise.

    Raises:
        ValueError: Such limits would come to a stand.
    """

    min_size: int = 1
    samples_per_insert: int = 1
    min_diff: float = -math.inf
    max_diff: float = math.inf

    def __post_init__(self) -> None:
        if self.min_size < 1 or self.samples_per_insert < 1:
            raise ValueError(
                f"min_size {self.min_size} and samples_per_insert {self.samples_per_insert} must be at least 1"
            )
        offset = self.samples_per_insert * self.min_size
        if self.max_diff < offset:
            raise ValueError(
                f"max_diff {self.max_diff:g} is below samples_per_insert {self.samples_per_insert} × min_size "
                f"{self.min_size} = {offset}: inserting would stop before the first use is given away. Raise max_diff, "
                "or lower min_size"
            )
        if self.min_diff > offset:
            raise ValueError(
                f"min_diff {self.min_diff:g} is above samples_per_insert {self.samples_per_insert} × min_size "
                f"{self.min_size} = {offset}: min_size samples would not be enough to give a use away. Lower min_diff, "
                "or raise min_size"
            )
        if self.largest_lease < 1:
            raise ValueError(
                f"max_diff {self.max_diff:g} and min_diff {self.min_diff:g} are less than samples_per_insert "
                f"{self.samples_per_insert} apart: inserting and sampling would wait for each other. Widen them"
            )

    @classmethod
    def with_error_buffer(cls, min_size: int, samples_per_insert: int, error_buffer: int | None) -> Self:
        """Limits that lie `error_buffer` uses to both sides of samples_per_insert · min_size; None: without bounds.

        Raises:
            ValueError: Such limits would come to a stand.
        """
        if error_buffer is None:
            return cls(min_size, samples_per_insert)
        if error_buffer < samples_per_insert:
            raise ValueError(
                f"error_buffer {error_buffer} is below samples_per_insert {samples_per_insert}: a single sample would "
                "shut inserting and a single use sampling. Raise error_buffer"
            )
        offset = samples_per_insert * min_size
        return cls(min_size, samples_per_insert, offset - error_buffer, offset + error_buffer)

    @property
    def largest_lease(self) -> float:
        """The most uses that one lease may ask for without the risk of waiting for ever; infinite without bounds."""
        return self.max_diff - self.samples_per_insert + 1 - max(self.min_diff, 0)

    def promise(self, num_uses: int) -> int:
        """What a sample that feeds so many uses promises."""
        return min(num_uses, self.samples_per_insert)

    def can_insert(self, state: LimiterState, promise: int) -> bool:
        """Whether another sample may begin to come in."""
        difference = state.promised + state.promising - state.sampled
        return state.size + state.num_inserting + 1 <= self.min_size or difference + promise <= self.max_diff

    def can_sample(self, state: LimiterState, num_uses: int) -> bool:
        """Whether so many uses may be given away, if they are there."""
        if state.is_sealed or state.is_full:
            return True
        return state.size >= self.min_size and state.promised - state.sampled - num_uses >= self.min_diff
