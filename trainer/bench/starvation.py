"""Does the trainer ever wait while the target supplies enough? The real path, a slow target, a step that only sleeps.

The target is given 1.2 times the rate at which the trainer's steps eat samples; the loop takes them as a training loop
does, through the real prefetcher, loader and buffer. What it waits, from its second step on, is the path's fault.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from services.contracts import StepLease
from services.memory import keep_freed_memory
from services.replay.config import ReplayConfig
from services.replay.embedded import EmbeddedRedis
from services.replay.links import close_links, link_shards
from services.replay.reader import ReplayReader
from trainer.bench.stream_parts import (
    PASS_S,
    SAMPLES_IN_BUFFER,
    FillOrder,
    SampleShape,
    StopOrder,
    process,
    run_shard,
    serve_target,
)
from trainer.bench.synthetic import synthetic_job, synthetic_signature
from trainer.depth import prefetch_bytes
from trainer.loading import MicroBatchLoader
from trainer.prefetch import Prefetcher
from trainer.recipe import Recipe

SUPPLY = 1.2
"""Rate of the target over that of the trainer."""

STEP_S = 0.25
STEPS = 80
PREFIX = "slipstream:bench-starvation"


def measure_starvation(
    say: Callable[[str], None], shape: SampleShape, *, num_steps: int = STEPS, step_s: float = STEP_S
) -> dict[str, Any]:
    """Run the test.

    Args:
        say: Hears of progress.
        shape: Of a sample; each step trains one.
        num_steps: Steps after the first, whose wait is that for the whole path to fill.
        step_s: How long a step sleeps.

    Returns:
        `wait_fraction`, the part of the time that the loop waited, and what it was measured with.
    """
    keep_freed_memory()
    say(f"starvation: {num_steps} steps of {step_s:g} s, a target that gives {SUPPLY:g} times what they eat")
    signature = synthetic_signature(shape.layer_ids, shape.hidden_size, "bf16")
    capacity_bytes = SAMPLES_IN_BUFFER * shape.bf16_bytes
    replay = ReplayConfig.model_validate({"capacity": capacity_bytes})
    recipe = Recipe.model_validate(
        {
            "target": {"model": "synthetic"},
            "prompts": {"source": "stdlib", "max_length": shape.num_tokens},
            "replay": {"capacity": capacity_bytes},
            "trainer": {"global_batch_size": 1, "micro_batch_size": 1, "precision": "bf16"},
        }
    )
    with contextlib.ExitStack() as stack:
        target = stack.enter_context(process(serve_target, shape, step_s / SUPPLY))
        shard = stack.enter_context(process(run_shard))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="slipstream-bench-")))
        redis = stack.enter_context(EmbeddedRedis.start(folder, capacity_bytes))
        (link,) = links = link_shards(redis.url, PREFIX)
        stack.callback(close_links, links)
        link.table.create(replay.capacity, signature, replay.reuse, replay.rate_limiter, replay.sampling)
        reader = stack.enter_context(contextlib.closing(ReplayReader(redis.url, PREFIX, signature)))
        address = target.orders.recv()
        link.registry.publish([address], time.time() + PASS_S)
        for capture in range(num_steps + 1):
            link.queue.push(synthetic_job(capture, shape.num_tokens))
        shard.orders.send(FillOrder(redis.url, PREFIX, replay, signature))
        loader = MicroBatchLoader(
            reader,
            recipe,
            signature,
            rank=0,
            generation=0,
            device=torch.device("cpu"),
            dtype=torch.bfloat16,
            hold=lambda leases: True,
        )
        batches = stack.enter_context(
            Prefetcher(
                _Steps(num_steps + 1),
                loader.load,
                depth_bytes=prefetch_bytes(recipe, signature),
                first_step=1,
                rank=0,
            )
        )
        began_s = 0.0
        for granted, micro_batches in batches.steps():
            for micro_batch in micro_batches:
                if granted.step == 1:
                    batches.take_wait_s()
                    began_s = time.perf_counter()
                else:
                    time.sleep(step_s)
                loader.ack(micro_batch)
        wait_fraction = batches.take_wait_s() / (time.perf_counter() - began_s)
        peak_bytes = link.table.info().peak_bytes
        shard.orders.send(StopOrder())
        shard.orders.recv()
    return {
        "wait_fraction": wait_fraction,
        "steps": num_steps,
        "step_s": step_s,
        "supply": SUPPLY,
        "peak_bytes": peak_bytes,
        "capacity_bytes": capacity_bytes,
    }


class _Steps:
    """Grants steps of one sample each, as the coordinator would, and END after the last."""

    def __init__(self, num_steps: int) -> None:
        self._num_steps = num_steps

    def step_lease(self, step: int) -> StepLease:
        if step > self._num_steps:
            return StepLease(step=step, num_micro_batches=0, end="the benchmark is over")
        return StepLease(step=step, num_micro_batches=1, num_uses=1)
