"""Ranks that train in processes of their own, with everything real but the buffer: captures are synthetic."""

from __future__ import annotations

import contextlib
import json
import math
import multiprocessing
import multiprocessing.forkserver
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from drafters.config import DrafterConfig
from drafters.registry import find_algorithm
from services.contracts import CaptureJob, LastRows, Sample, SampleLease, StepLease, StepReport
from trainer.draft_vocabulary import FILE, DraftVocabulary
from trainer.recipe import Recipe

NUM_LAYERS, HIDDEN, VOCAB = 6, 16, 48
DRAFTERS: dict[str, dict[str, Any]] = {
    "dspark": {
        "num_draft_layers": 1,
        "block_size": 3,
        "num_anchors": 4,
        "target_layer_ids": (0, 1),
        "mask_token_id": VOCAB - 1,
        "markov_rank": 4,
    },
    "dflash": {
        "algorithm": "dflash",
        "num_draft_layers": 1,
        "block_size": 3,
        "num_anchors": 4,
        "target_layer_ids": (0, 1),
        "mask_token_id": VOCAB - 1,
    },
    "eagle3": {"algorithm": "eagle3", "target_layer_ids": (0, 1, 2, 3, 4), "ttt_length": 3},
    "eagle3_cut": {
        "algorithm": "eagle3",
        "target_layer_ids": (0, 1, 2, 3, 4),
        "ttt_length": 3,
        "draft_vocab_size": VOCAB // 2,
    },
}
KEPT = tuple(range(1, VOCAB, 2))
"""Tokens that eagle3_cut drafts."""

DEADLINE_S = 400.0


def save_target(folder: Path) -> Path:
    """Write a tiny target model."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=32,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=64,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder


def make_recipe(target_folder: Path, output_dir: Path, drafter: str = "dspark", **trainer: Any) -> Recipe:
    settings = {
        "world_size": 1,
        "num_gpus": 0,
        "threads": 1,
        "precision": "fp32",
        "global_batch_size": 8,
        "micro_batch_size": 2,
        "learning_rate": 3e-3,
        "checkpoint_every": 3,
        "max_steps": 6,
    }
    return Recipe.model_validate(
        {
            "output_dir": str(output_dir),
            "target": {"model": str(target_folder), "dtype": "float32", "num_gpus": 0, "max_batch_samples": 1},
            "prompts": {"source": "stdlib"},
            "drafter": DRAFTERS[drafter],
            "trainer": settings | trainer,
        }
    )


class CountingCoordinator:
    """Grants `max_steps` steps in plan order: of each micro-batch of all ranks, a consecutive piece to each rank.

    Args:
        recipe: The run's.
        num_uses: Uses of the whole plan; None fills every step.
        log: Where reports go.
        on_report: Called with the step of each report.
    """

    def __init__(
        self,
        recipe: Recipe,
        num_uses: int | None = None,
        log: Path | None = None,
        on_report: Callable[[int], None] | None = None,
    ) -> None:
        self._trainer = recipe.trainer
        self._num_uses = num_uses
        self._log = log
        self._on_report = on_report

    def step_lease(self, step: int) -> StepLease:
        trainer = self._trainer
        assert trainer.max_steps is not None
        if step > trainer.max_steps:
            return StepLease(step=step, num_micro_batches=0)
        first = (step - 1) * trainer.global_batch_size
        last = first + trainer.global_batch_size
        uses = range(first, last if self._num_uses is None else min(last, self._num_uses))
        size, ranks = trainer.layout.samples_per_pass, trainer.world_size
        num_passes = math.ceil(len(uses) / (size * ranks))
        captures = tuple(
            tuple(
                tuple(uses[(index * ranks + rank) * size : (index * ranks + rank + 1) * size])
                for index in range(num_passes)
            )
            for rank in range(ranks)
        )
        return StepLease(step=step, num_micro_batches=num_passes, captures=captures)

    def report(self, report: StepReport) -> None:
        if self._log:
            with self._log.open("a") as log:
                log.write(report.model_dump_json() + "\n")
        if self._on_report:
            self._on_report(report.step)

    def ledger_at(self, step: int) -> str:
        return json.dumps({"step": step}) + "\n"

    def saved(self, step: int) -> None:
        pass


def synthetic_sample(capture: int, drafter: DrafterConfig) -> Any:
    """Features and tokens that depend on the capture's number alone."""
    from services.replay.reader import CapturedSample

    generator = torch.Generator().manual_seed(capture)
    length = 9 + capture % 4
    loss_mask = [0] * 3 + [1] * (length - 3)
    rows = LastRows(find_algorithm(drafter.algorithm).last_rows).select(loss_mask)
    input_ids = torch.randint(0, VOCAB - 1, (length,), generator=generator)
    job = CaptureJob(
        capture=capture,
        prompt=capture,
        epoch=0,
        input_ids=tuple(input_ids.tolist()),
        loss_mask=tuple(loss_mask),
        last_rows=tuple(rows),
    )
    sample = Sample(job=job, chunks=(), num_bytes=0, target="")
    return CapturedSample(
        lease=SampleLease(lease_id=str(capture), use=capture, k=0, sample=sample),
        input_ids=input_ids,
        loss_mask=torch.tensor(loss_mask),
        context=torch.randn(length, context_width(drafter), generator=generator),
        last_rows=torch.tensor(rows),
        last=torch.randn(len(rows), HIDDEN, generator=generator),
    )


def context_width(drafter: DrafterConfig) -> int:
    assert drafter.target_layer_ids is not None
    return len(drafter.target_layer_ids) * HIDDEN


class Plan(NamedTuple):
    """What is the same for all ranks of a group."""

    recipe: Recipe
    resume_from: Path | None
    num_uses: int | None
    on_report: Callable[[int], None] | None


def train_rank(rank: int, plan: Plan, ports: Any, results: Any) -> None:
    """One rank in a process of its own."""
    try:
        results.put((rank, _train_rank(rank, plan, ports)))
    except BaseException as error:
        results.put((rank, repr(error)))
        raise


def _train_rank(rank: int, plan: Plan, ports: Any) -> Any:
    from packing_reference import collate

    from trainer.checkpoint import checkpoint_step
    from trainer.collate import without_samples
    from trainer.distributed import (
        DTYPES,
        build_engine,
        connect_store,
        library_output_to,
        open_store,
        process_group,
        training_device,
    )
    from trainer.figures import RunFigures
    from trainer.loop import TrainingLoop
    from trainer.prefetch import Prefetcher
    from trainer.saving import CheckpointWriter, restore
    from trainer.training import load_libraries, new_drafter

    recipe, resume_from = plan.recipe, plan.resume_from
    config, output_dir = recipe.trainer, recipe.output_dir
    load_libraries(config)
    if rank == 0:
        store = open_store("127.0.0.1", config.world_size)
        for _ in range(config.world_size - 1):
            ports.put(f"127.0.0.1:{store.port}")
    else:
        store = connect_store(ports.get(), config.world_size)
    device, done_steps = training_device(config), checkpoint_step(resume_from) if resume_from else 0

    def load(captures: Sequence[int] | None, num_left: int, room: Any) -> Any:
        assert captures is not None
        dtype = DTYPES[config.precision]
        if not captures:
            return without_samples(context_width(recipe.drafter), HIDDEN, dtype)
        micro_batch = collate([synthetic_sample(capture, recipe.drafter) for capture in captures], captures, dtype)
        room.wait_for(micro_batch.num_bytes)
        return micro_batch

    coordinator = CountingCoordinator(recipe, plan.num_uses, output_dir / f"reports_{rank}.jsonl", plan.on_report)
    checkpoints = CheckpointWriter(output_dir, recipe, rank, ["slipstream", "test"])
    acked: list[int] = []
    rejections: list[float] = []
    with (
        library_output_to(output_dir / "logs" / f"rank_{rank}.log"),
        process_group(store, rank, config, device),
        Prefetcher(coordinator, load, depth_bytes=2**14, first_step=done_steps + 1, rank=rank) as batches,
    ):
        drafter = new_drafter(recipe, recipe.output_dir).to(DTYPES[config.precision])
        if rank == 0 and not resume_from:
            checkpoints.write_untrained(drafter)
        engine = build_engine(drafter, config)
        last_losses = restore(engine, resume_from) if resume_from else []
        before = random_states()
        result = TrainingLoop(
            engine=engine,
            batches=batches,
            ack=lambda micro_batch: acked.extend(lease.use for lease in micro_batch.leases),
            update_priorities=lambda micro_batch, values: rejections.extend(values.tolist()),
            coordinator=coordinator,
            checkpoints=checkpoints,
            emit=lambda kind, **fields: None,
            config=config,
            rank=rank,
            generation=1,
            total_steps=config.max_steps or 0,
            done_steps=done_steps,
            figures=RunFigures(last_losses),
        ).run()
    return result.model_dump() | {"acked": acked, "rejections": rejections, "drew_randomly": random_states() != before}


@contextlib.contextmanager
def open_engine(recipe: Recipe) -> Iterator[Any]:
    """The engine of a run's only rank, in this process, with nothing trained."""
    from trainer.distributed import DTYPES, build_engine, library_output_to, open_store, process_group, training_device
    from trainer.training import load_libraries, new_drafter

    config = recipe.trainer
    load_libraries(config)
    with (
        library_output_to(recipe.output_dir / "logs" / "rank_0.log"),
        process_group(open_store("127.0.0.1", 1), 0, config, training_device(config)),
    ):
        yield build_engine(new_drafter(recipe, recipe.output_dir).to(DTYPES[config.precision]), config)


def random_states() -> list[Any]:
    """Of every global generator that training could draw from."""
    import numpy

    return [torch.get_rng_state().tolist(), random.getstate(), str(numpy.random.get_state())]


@cache
def fork_context() -> Any:
    """Processes that begin with everything imported: most of what a rank's start takes."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["trainer.training", "deepspeed"])
    before = dict(os.environ)
    os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": "0"}  # as `load_deepspeed` sets them before its import
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return context


def keep_vocabulary(output_dir: Path) -> None:
    """Write the draft vocabulary of a run, as its driver would: every second token."""
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / FILE).write_text(DraftVocabulary(tokens=KEPT).model_dump_json())


def train_group(
    recipe: Recipe,
    resume_from: Path | None = None,
    *,
    num_uses: int | None = None,
    on_report: Callable[[int], None] | None = None,
    watch: Callable[[int], None] | None = None,
) -> Any:
    """Train with all ranks; returns their results by rank.

    Args:
        recipe: The run's.
        resume_from: A checkpoint.
        num_uses: Uses of the whole plan; None fills every step.
        on_report: Called in each rank's process after a step, before its checkpoint.
        watch: Called while the ranks run, which then start from nothing, with this process's id.
    """
    context = multiprocessing.get_context("spawn") if watch else fork_context()
    ports, results = context.Queue(), context.Queue()
    plan = Plan(recipe, resume_from, num_uses, on_report)
    ranks = range(recipe.trainer.world_size)
    processes = [context.Process(target=train_rank, args=(rank, plan, ports, results)) for rank in ranks]
    for process in processes:
        process.start()
    try:
        deadline_s, outcome = time.monotonic() + DEADLINE_S, {}
        while len(outcome) < len(processes):
            assert time.monotonic() < deadline_s, f"training took more than {DEADLINE_S:g} s"
            if watch:
                watch(os.getpid())
            if not results.empty():
                rank, result = results.get()
                outcome[rank] = result
            time.sleep(0.02)
    finally:
        for process in processes:
            process.kill() if process.is_alive() and len(outcome) < len(processes) else process.join(20)
    failures = {rank: result for rank, result in outcome.items() if isinstance(result, str)}
    assert not failures, failures
    return [outcome[rank] for rank in ranks]


def losses_of(output_dir: Path, rank: int = 0) -> dict[int, float]:
    reports = [StepReport.model_validate_json(line) for line in (output_dir / f"reports_{rank}.jsonl").open()]
    return {report.step: report.metrics["loss"] for report in reports}


def weights_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(checkpoint / "model.safetensors")
