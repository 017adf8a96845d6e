"""The learning rate: linear warm-up, then a cosine to zero (specs: drafters, training settings)."""

from __future__ import annotations

import math


def planned_steps(num_uses: int, global_batch_size: int, *, tail: str, max_steps: int | None) -> int:
    """Optimizer steps that a plan of `num_uses` uses takes, at most `max_steps`.

    Args:
        num_uses: Uses in the plan.
        global_batch_size: Uses of one step.
        tail: "pad" trains a last step without a full batch, "drop" leaves it out.
        max_steps: Limit of the recipe, if any.
    """
    steps = num_uses // global_batch_size if tail == "drop" else math.ceil(num_uses / global_batch_size)
    return steps if max_steps is None else min(steps, max_steps)


def learning_rate_factor(step: int, *, total_steps: int, warmup_fraction: float) -> float:
    """What the peak learning rate is multiplied by in a step.

    With w = warmup_fraction · total_steps: ``step / w`` up to step w, then ``(1 + cos(π · p)) / 2`` where p runs
    from 0 at step w to 1 at total_steps. It depends on nothing but the step, so that a resumed run needs no state.

    Args:
        step: Number of the step, from 1; later than total_steps gives 0.
        total_steps: Steps of the whole run.
        warmup_fraction: Part of them with linear warm-up.
    """
    warmup_steps = warmup_fraction * total_steps
    if step < warmup_steps:
        return step / warmup_steps
    if step >= total_steps:
        return 0.0
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return (1.0 + math.cos(math.pi * progress)) / 2
