"""The hardware-aware prefix scheduler: how many drafts of each request one target step verifies. No torch.

A step with B tokens takes 1 / SPS(B) seconds (SPS: steps a second) and is expected to commit τ of them, so it gives
Θ = τ · SPS(B) tokens a second. With R requests and nothing but their anchors, B = R and τ = R. The drafts of all
requests are then gone through by falling survival probability; each adds 1 to B and its survival to τ, and is admitted
as long as Θ grows. The first that does not make it grow ends the search (the DSpark paper's Algorithm 1).

The early stop keeps decoding lossless. A draft's survival says how sure the drafter is after it saw the drafts before
it. A search past a step that does not pay would look at the survival of later drafts, which depends on what this draft
is, to decide whether this draft is verified: unverified drafts would then no longer be a fair sample of the draft
distribution, and the output would lean to tokens that the drafter goes on from with confidence. Stopped early, a draft
is admitted on what was known before it was drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

StepsPerSecond = Callable[[int], float]
"""SPS(B): target steps a second with B tokens in the batch."""


def schedule(survival: Sequence[Sequence[float]], steps_per_s: StepsPerSecond) -> list[int]:
    """How many drafts of each request are verified.

    Args:
        survival: One row a request: for each of its drafts the probability that it and all before it are accepted.
            Rows must not rise.
        steps_per_s: Asked for B from R, the number of requests, up to R plus all drafts.

    Returns:
        One length a request; a request's first drafts, always.

    Raises:
        ValueError: A row rises.
    """
    for request, row in enumerate(survival):
        if any(later > earlier for earlier, later in pairwise(row)):
            raise ValueError(
                f"survival of request {request} rises from draft to draft: {list(row)}. A draft survives only if all "
                "before it do: give cumulative products"
            )
    num_requests = len(survival)
    if not num_requests:
        return []
    # Of equal survival the earlier draft comes first, so that what is admitted of a request is a prefix.
    candidates = sorted(
        (-probability, position, request)
        for request, row in enumerate(survival)
        for position, probability in enumerate(row)
        if probability > 0
    )
    lengths = [0] * num_requests
    num_tokens, expected = num_requests, float(num_requests)
    throughput = expected * steps_per_s(num_tokens)
    for negative, _, request in candidates:
        num_tokens += 1
        expected -= negative
        candidate = expected * steps_per_s(num_tokens)
        if candidate <= throughput:
            break
        lengths[request] += 1
        throughput = candidate
    return lengths
