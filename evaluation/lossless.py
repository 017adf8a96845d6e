"""Where speculative greedy output leaves the target's own, and whether the dtype's rounding explains it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from evaluation.report import Divergence

ROUNDING_STEPS = 4
"""Below float32, logits this many rounding steps apart are a tie: a verification of γ + 1 rows and a decode of one row
sum in different orders, and each of the two logits is off by a step or two."""


def first_difference(ours: Sequence[int], reference: Sequence[int]) -> int | None:
    """Index of the first entry that differs, the shorter length if one is a prefix of the other, None if equal."""
    for index, (left, right) in enumerate(zip(ours, reference, strict=False)):
        if left != right:
            return index
    return None if len(ours) == len(reference) else min(len(ours), len(reference))


def rounding_tolerance(logits: Tensor) -> float:
    """How far apart two of these logits [V] may be and still be a tie: 0 in float32, where equality is exact."""
    if logits.dtype in (torch.float32, torch.float64):
        return 0.0
    return ROUNDING_STEPS * torch.finfo(logits.dtype).eps * float(logits.abs().max())


@torch.inference_mode()
def find_divergence(
    target_model: nn.Module, ours: Sequence[int], reference: Sequence[int], *, sample: int, num_prompt_tokens: int
) -> Divergence | None:
    """Compare one row's speculative output with the target's own; both with the prompt.

    Costs one target forward over the common prefix, and only where the two differ.
    """
    index = first_difference(ours, reference)
    if index is None:
        return None
    prefix = torch.tensor([list(reference[:index])], device=next(target_model.parameters()).device)
    logits = target_model(input_ids=prefix, use_cache=False, logits_to_keep=1).logits[0, -1]
    largest = logits.float().topk(2).values.tolist()
    target_token = reference[index] if index < len(reference) else None
    our_token = ours[index] if index < len(ours) else None
    token_gap = None
    if target_token is not None and our_token is not None:
        token_gap = float(logits[target_token].float() - logits[our_token].float())
    return Divergence(
        sample=sample,
        position=index - num_prompt_tokens,
        target_token=target_token,
        our_token=our_token,
        top2_gap=largest[0] - largest[1],
        token_gap=token_gap,
        within_rounding=_is_tie(token_gap, rounding_tolerance(logits)),
    )


def _is_tie(token_gap: float | None, tolerance: float) -> bool:
    return token_gap is not None and tolerance > 0 and abs(token_gap) <= tolerance
