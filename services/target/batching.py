"""Which waiting requests share the next forward pass. Pure: no clock, no thread, no tensor.

A forward pass over requests of lengths t_1 … t_n costs n · max(t) tokens, padding included. The oldest request leads,
so none starves; those nearest to it in length join while n · max(t) stays within the token budget.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple


class Waiting(NamedTuple):
    """What the policy sees of a request: how long it is, and with whom it can share a pass."""

    num_tokens: int
    group: Hashable


def next_batch(waiting: Sequence[Waiting], *, max_batch_tokens: int, max_batch_samples: int) -> list[int]:
    """Choose the next forward pass.

    Args:
        waiting: The queue, oldest first.
        max_batch_tokens: Token budget, padding included. The oldest request goes alone if it exceeds it by itself.
        max_batch_samples: Most requests of one pass.

    Returns:
        Indices into `waiting`, oldest first; empty only if the queue is.
    """
    if not waiting:
        return []
    head = waiting[0]
    joiners = sorted(
        (i for i in range(1, len(waiting)) if waiting[i].group == head.group),
        key=lambda i: (abs(waiting[i].num_tokens - head.num_tokens), i),
    )
    batch, longest = [0], head.num_tokens
    for i in joiners:
        if len(batch) == max_batch_samples:
            break
        longest_with = max(longest, waiting[i].num_tokens)
        if (len(batch) + 1) * longest_with <= max_batch_tokens:
            batch.append(i)
            longest = longest_with
    return sorted(batch)


def is_full(waiting: Sequence[Waiting], *, max_batch_tokens: int, max_batch_samples: int) -> bool:
    """Whether waiting longer cannot add to the next pass: some request of its group is already left out."""
    batch = next_batch(waiting, max_batch_tokens=max_batch_tokens, max_batch_samples=max_batch_samples)
    if len(batch) == max_batch_samples:
        return True
    return any(i not in batch and request.group == waiting[0].group for i, request in enumerate(waiting))
