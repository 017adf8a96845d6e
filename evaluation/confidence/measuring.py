"""Measures what a decoding step takes with a number of requests, and of tokens of each, on this target and drafter."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle, islice
from statistics import median

import torch
from torch import nn

from drafters.drafter import Drafter
from evaluation.confidence.step_times import StepTimes
from evaluation.fitting import context_tokens
from evaluation.ragged_target import PREFILL_TOKENS, RaggedTarget
from evaluation.timing import PhaseClock
from services.errors import TargetError, UsageError

NUM_REPEATS = 9
"""Each time is the median of so many, taken in turns, so that a slow moment of the machine hits all alike."""


@torch.inference_mode()
def measure_step_times(
    target: nn.Module,
    drafter: Drafter,
    num_requests: int,
    context: Sequence[int],
    *,
    tokens_observed: int,
    repeats: int = NUM_REPEATS,
) -> StepTimes:
    """Time the parts of a step with R requests, all with the same context.

    Args:
        target: A transformers causal LM in evaluation mode.
        drafter: On the target's device.
        num_requests: R.
        context: Tokens before the step, at least one; cut where the target's context ends.
        tokens_observed: Tokens that a round commits, and that the drafter takes in before it drafts again.
        repeats: Of each measurement, beside one that warms up.

    Raises:
        UsageError: The target's context has no room for a step.
        TargetError: The device has too little memory for so many requests.
    """
    num_drafts = drafter.settings.num_drafts
    tokens_observed = min(tokens_observed, num_drafts + 1)
    context = _fitted(target, context, num_drafts, repeats, tokens_observed)
    try:
        with RaggedTarget(target, num_requests, drafter.settings.target_layer_ids) as ragged:
            return _measure(ragged, drafter, num_requests, list(context), tokens_observed, repeats)
    except torch.OutOfMemoryError as error:
        raise TargetError(
            f"too little memory for steps of {num_requests} requests with {len(context)} tokens each: give a lower "
            f"--concurrency ({error})"
        ) from error


def _measure(
    ragged: RaggedTarget,
    drafter: Drafter,
    num_requests: int,
    context: list[int],
    tokens_observed: int,
    repeats: int,
) -> StepTimes:
    state = drafter.start_drafting(num_requests)
    state.open(range(num_requests))
    group = max(1, PREFILL_TOKENS // len(context))
    for first in range(0, num_requests, group):
        count = min(group, num_requests - first)
        ragged.prefill([context] * count, first)
        next_ids = torch.tensor([context[1:] + context[:1]] * count, device=ragged.device)
        drafter.observe(state, ragged.features(len(context)), next_ids, [len(context)] * count, first)
    num_tokens = drafter.settings.num_drafts + 1
    rows = torch.tensor([list(islice(cycle(context), num_tokens))] * num_requests, device=ragged.device)
    starts = [len(context)] * num_requests
    counts = [tokens_observed] * num_requests
    draft_s: list[float] = []
    verify_s: list[list[float]] = [[] for _ in range(num_tokens)]
    for repeat in range(repeats + 1):
        for tokens in range(1, num_tokens + 1):
            clock = PhaseClock(ragged.device)
            with clock.phase("verify"):
                ragged.extend(rows[:, :tokens], starts)
            if repeat:
                verify_s[tokens - 1].append(clock.timing(1).verify_s)
        # The longest pass was the last, so its features are enough for any number of tokens.
        features = ragged.features(tokens_observed)
        clock = PhaseClock(ragged.device)
        with clock.phase("draft"):
            drafter.observe(state, features, rows[:, :tokens_observed], counts)
            drafter.propose(state, rows[:, tokens_observed - 1])
        if repeat:
            draft_s.append(clock.timing(1).draft_s)
    return StepTimes(num_requests=num_requests, draft_s=median(draft_s), verify_s=tuple(map(median, verify_s)))


def _fitted(
    target: nn.Module, context: Sequence[int], num_drafts: int, repeats: int, tokens_observed: int
) -> Sequence[int]:
    """The context with room behind it for what is measured."""
    longest = context_tokens(target)
    needed = num_drafts + 1 + (repeats + 1) * tokens_observed
    if longest is None or len(context) + needed <= longest:
        return context
    if longest <= needed:
        raise UsageError(
            f"the target's context of {longest} tokens has no room for the {needed} that are measured: step times "
            "cannot be measured on it"
        )
    return context[: longest - needed]
