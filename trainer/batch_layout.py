"""How a global batch is cut into forward passes, and which of its sequences share a loss. No torch.

A loss is a sum over sequences divided by one over the same sequences (specs: drafters, "Loss"), and a step is the mean
of its losses. Which sequences share one must therefore not change with the number of ranks if the step is to stay the
same. In deterministic mode each `micro_batch_size` consecutive sequences of the plan share one, on whichever ranks they
are; otherwise, where the order is nobody's choice, those that all ranks pass through the drafter at once.

    micro_batch_size 4, 8 sequences a step       losses of a step
    1 rank    [0 1 2 3] then [4 5 6 7]           {0 1 2 3} {4 5 6 7}
    2 ranks   [0 1 2 3 | 4 5 6 7]                {0 1 2 3} {4 5 6 7}; not deterministic: {0 … 7}
    4 ranks   [0 1 | 2 3 | 4 5 | 6 7]            {0 1 2 3} {4 5 6 7}; not deterministic: {0 … 7}
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

from services.contracts import StepLease


@dataclass(frozen=True)
class BatchLayout:
    """One optimizer step on a number of ranks.

    Attributes:
        samples_per_pass: Sequences of one forward pass of one rank.
        num_passes: Forward passes of one rank in a full step (the accumulation).
        ranks_per_loss: So many neighbouring ranks share a loss in each pass.
    """

    samples_per_pass: int
    num_passes: int
    ranks_per_loss: int

    @classmethod
    def of(cls, *, global_batch_size: int, world_size: int, micro_batch_size: int, deterministic: bool) -> Self:
        """The layout with the fewest passes.

        Args:
            global_batch_size: Sequences of a step; a multiple of the ranks.
            world_size: Ranks.
            micro_batch_size: Most sequences of a pass.
            deterministic: Whether the losses of a step must be the same for every number of ranks.
        """
        most = min(micro_batch_size, global_batch_size)
        share = global_batch_size // world_size
        if not deterministic:
            samples = _largest(most, lambda count: share % count == 0)
            return cls(samples, share // samples, world_size)
        per_loss = _largest(most, lambda count: global_batch_size % count == 0)

        def fits(count: int) -> bool:
            return share % count == 0 and per_loss % count == 0 and world_size % (per_loss // count) == 0

        samples = _largest(per_loss, fits)  # there is one: per_loss / gcd(per_loss, world_size)
        return cls(samples, share // samples, per_loss // samples)

    def num_losses(self, lease: StepLease) -> int:
        """Losses that the step's is the mean of; the last one of a plan may have fewer sequences than the others."""
        if lease.captures is None or self.ranks_per_loss == len(lease.captures):
            return lease.num_micro_batches
        num_samples = sum(len(captures) for rank in lease.captures for captures in rank)
        return -(-num_samples // (self.samples_per_pass * self.ranks_per_loss))


def _largest(most: int, fits: Callable[[int], bool]) -> int:
    """The largest count up to `most` that fits."""
    return next(count for count in range(most, 0, -1) if fits(count))
