"""How fast evaluation decodes: a batch against one prompt after the other, and plainly against speculatively.

One run, the sides by turns, medians of the turns. The drafter is a checkpoint, or else an untrained one that begins
with the target's own layers, as the demo's does: what a batch gains hardly depends on which drafts are accepted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from drafters.build import build_drafter
from drafters.drafter import Drafter
from drafters.target_weights import copy_target_embeddings, copy_target_layers
from evaluation.bench.hardware import describe_hardware
from evaluation.config import EvaluationConfig
from evaluation.evaluator import Evaluator
from evaluation.loading import load_drafter_of, load_target
from evaluation.origin import check_origin
from evaluation.speedup import measure_speedup, timed_decode
from services.prompts.chat import ChatEncoder
from services.prompts.intake import first_turns
from services.prompts.sources import load_conversations
from services.stop_tokens import find_stop_token_ids

BATCH_SIZE = 16
NUM_PROMPTS = 64
"""Prompts of the whole evaluation; a turn decodes `BATCH_SIZE` of them."""
MAX_PROMPT_TOKENS = 384
UNTRAINED = "untrained, begun with two of the target's layers"
WARM_START_LAYERS = (0, 3)
"""Target layers that the untrained drafter begins with, as the demo's does."""
SEED = 980406


def measure_evaluation(
    target: Path, drafter: Path | None, say: Callable[[str], None], *, turns: int, max_new_tokens: int
) -> dict[str, Any]:
    """Decode held-out prompts of the standard library in batches of 1 and 16.

    Args:
        target: Folder of the demo's target.
        drafter: Folder of a checkpoint; None takes an untrained drafter.
        say: Where progress goes.
        turns: How often each side decodes 16 prompts; the whole evaluation runs once.
        max_new_tokens: Tokens a prompt.

    Returns:
        One object for scripts: tokens/s by side and batch size, their ratios, the speedup with where its time goes, and
        the seconds that an evaluation of 64 prompts takes, its lossless check included.

    Raises:
        TargetError: The target cannot be loaded.
        CheckpointError: The folder holds no drafter of this target.
    """
    model = load_target(target, torch.float32, torch.device("cpu"))
    heldout = first_turns(
        load_conversations("stdlib", split="heldout", strict=False),
        ChatEncoder(target, system_prompt=None, enable_thinking=False),
        count=NUM_PROMPTS,
        seed=SEED,
        max_length=MAX_PROMPT_TOKENS,
    )
    prompts = [prompt.token_ids for prompt in heldout]
    if drafter is None:
        drafting = _untrained(model, target)
    else:
        check_origin(drafter, target, allow_other_target=False)
        drafting = load_drafter_of(model, str(drafter), torch.float32, torch.device("cpu"))
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "stop_token_ids": find_stop_token_ids(target)}
    sides = {"speculative": drafting, "plain": None}
    speeds = _take_turns(model, sides, prompts, turns, options, say)
    say("plain against speculative decoding, 16 at once")
    speedup = measure_speedup(model, drafting, prompts, batch_size=BATCH_SIZE, **options)
    say(f"evaluation of {len(prompts)} prompts")
    began_s = time.perf_counter()
    config = EvaluationConfig(max_samples=NUM_PROMPTS, batch_size=BATCH_SIZE, max_new_tokens=max_new_tokens)
    report = Evaluator(str(target), heldout, config).measure(drafting, "bench", label="bench")
    return {
        "drafter": UNTRAINED if drafter is None else str(drafter),
        "tokens_per_s": {
            side: {str(size): median(values) for size, values in by_size.items()} for side, by_size in speeds.items()
        },
        "ratio": {
            side: median(many / one for one, many in zip(by_size[1], by_size[BATCH_SIZE], strict=True))
            for side, by_size in speeds.items()
        },
        "speedup": speedup.ratio,
        "accepted_length": speedup.accepted_length,
        "phases": {"plain": speedup.plain.model_dump(), "speculative": speedup.speculative.model_dump()},
        "evaluation": {
            "num_prompts": report.num_samples,
            "seconds": time.perf_counter() - began_s,
            "decoding_s": report.seconds,
            "lossless": report.lossless,
        },
        "batch_size": BATCH_SIZE,
        "max_new_tokens": max_new_tokens,
        "turns": turns,
        "threads": torch.get_num_threads(),
        "hardware": describe_hardware(),
    }


def _take_turns(
    model: nn.Module,
    sides: dict[str, Drafter | None],
    prompts: Sequence[Sequence[int]],
    turns: int,
    options: dict[str, Any],
    say: Callable[[str], None],
) -> dict[str, dict[int, list[float]]]:
    """Tokens a second by side and batch size, one number a turn; every turn has prompts of its own."""
    speeds: dict[str, dict[int, list[float]]] = {side: {1: [], BATCH_SIZE: []} for side in sides}
    for drafter in sides.values():
        timed_decode(model, drafter, prompts[:BATCH_SIZE], batch_size=BATCH_SIZE, **(options | {"max_new_tokens": 4}))
    for turn in range(turns):
        say(f"turn {turn + 1} of {turns}")
        start = turn * BATCH_SIZE % len(prompts)
        group = prompts[start : start + BATCH_SIZE]
        for side, drafter in sides.items():
            for size in (1, BATCH_SIZE):
                _, timing = timed_decode(model, drafter, group, batch_size=size, **options)
                speeds[side][size].append(1 / timing.token_s)
    return speeds


def _untrained(model: Any, target: Path) -> Drafter:
    torch.manual_seed(SEED)
    settings: dict[str, Any] = {"block_size": 5, "markov_rank": 64, "mask_token_id": 3}
    drafter = build_drafter(model.config, "dspark", num_draft_layers=len(WARM_START_LAYERS), **settings)
    copy_target_embeddings(drafter, target)
    copy_target_layers(drafter, target, WARM_START_LAYERS)
    return drafter.eval()
