"""Puts one rank's training together: group, drafter, engine, buffer; then runs the loop."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from transformers import AutoConfig

from drafters.build import build_drafter
from drafters.drafter import Drafter
from drafters.eagle3 import Eagle3Drafter
from drafters.target_weights import TargetWeightsError, copy_target_embeddings, copy_target_layers
from services.contracts import SampleLease, TableSignature
from services.errors import TargetError
from services.models import find_model
from services.replay.connect import connect
from services.replay.reader import ReplayReader
from services.telemetry import TelemetryWriter
from trainer.checkpoint import checkpoint_step
from trainer.depth import prefetch_bytes
from trainer.distributed import (
    DTYPES,
    build_engine,
    library_output_to,
    load_deepspeed,
    process_group,
    training_device,
)
from trainer.draft_vocabulary import read_vocabulary
from trainer.figures import RunFigures, TrainResult
from trainer.loading import MicroBatchLoader
from trainer.loop import CoordinatorSide, TrainingLoop
from trainer.prefetch import LeaseSource, Prefetcher
from trainer.recipe import Recipe, TrainerConfig
from trainer.saving import CheckpointWriter, restore
from trainer.schedule import planned_steps

logger = logging.getLogger(__name__)


class CoordinatorLink(LeaseSource, CoordinatorSide, Protocol):
    """All that a rank asks of the coordinator."""

    def planned_uses(self) -> int:
        """Uses in the plan."""
        ...

    def hold(self, leases: Sequence[SampleLease]) -> bool:
        """Say that samples are in memory; False if they are to be dropped."""
        ...


def load_libraries(config: TrainerConfig) -> None:
    """Import and configure what takes seconds, before there is anything to train on."""
    if config.threads:
        torch.set_num_threads(config.threads)
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with this
        torch.use_deterministic_algorithms(True)
    load_deepspeed(training_device(config))


def train(
    store: dist.TCPStore,
    rank: int,
    recipe: Recipe,
    redis_urls: Sequence[str],
    prefix: str,
    *,
    signature: TableSignature,
    coordinator: CoordinatorLink,
    output_dir: Path,
    resume_from: Path | None,
    generation: int,
    command: Sequence[str],
) -> TrainResult:
    """Train one rank until the coordinator grants no more steps.

    The buffer is read from the first moment on, so that captures begin while the engine is still being built.
    """
    config = recipe.trainer
    device, dtype = training_device(config), DTYPES[config.precision]
    done_steps = checkpoint_step(resume_from) if resume_from else 0
    reader = ReplayReader(redis_urls, prefix, signature)
    loader = MicroBatchLoader(
        reader,
        recipe,
        signature,
        rank=rank,
        generation=generation,
        device=device,
        dtype=dtype,
        hold=coordinator.hold,
    )
    checkpoints = CheckpointWriter(output_dir, recipe, rank, command, signature.fingerprint)
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.closing(reader))
        stack.enter_context(library_output_to(output_dir / "logs" / f"rank_{rank}.log"))
        stack.enter_context(process_group(store, rank, config, device))
        batches = stack.enter_context(
            Prefetcher(
                coordinator,
                loader.load,
                depth_bytes=prefetch_bytes(recipe, signature),
                first_step=done_steps + 1,
                rank=rank,
            )
        )
        telemetry = stack.enter_context(contextlib.closing(TelemetryWriter(connect(redis_urls[0]), prefix)))
        drafter = new_drafter(recipe, output_dir).to(dtype)
        if rank == 0 and not resume_from:
            checkpoints.write_untrained(drafter)
        engine = build_engine(drafter, config)
        last_losses = restore(engine, resume_from) if resume_from else []
        total_steps = planned_steps(
            coordinator.planned_uses(), config.global_batch_size, tail=config.tail, max_steps=config.max_steps
        )
        logger.info("training from step %d to step %d", done_steps + 1, total_steps)
        return TrainingLoop(
            engine=engine,
            batches=batches,
            ack=loader.ack,
            coordinator=coordinator,
            checkpoints=checkpoints,
            emit=telemetry.emit,
            config=config,
            rank=rank,
            generation=generation,
            total_steps=total_steps,
            done_steps=done_steps,
            figures=RunFigures(last_losses),
            update_priorities=loader.update_priorities if recipe.replay.is_prioritized else None,
        ).run()


def new_drafter(recipe: Recipe, output_dir: Path) -> Drafter:
    """A drafter for the recipe's target: its embedding and head, and its layers or new weights from the seed.

    Args:
        recipe: With the drafter's settings resolved for the target.
        output_dir: The run's directory, which has the draft vocabulary if it is cut.

    Raises:
        TargetError: The target's weights cannot be read, or do not fit.
        CheckpointError: The draft vocabulary cannot be read.
    """
    folder, warm_start_layers = find_model(recipe.target.model, weights=True), recipe.drafter.warm_start_layers
    torch.manual_seed(recipe.trainer.seed)
    drafter = build_drafter(AutoConfig.from_pretrained(folder), **recipe.drafter.model_dump())
    try:
        copy_target_embeddings(drafter, folder)
        if warm_start_layers:
            copy_target_layers(drafter, folder, warm_start_layers)
    except TargetWeightsError as error:
        raise TargetError(f"cannot begin with the target's weights: {error}") from error
    if isinstance(drafter, Eagle3Drafter) and recipe.drafter.draft_vocab_size:
        drafter.set_vocabulary(read_vocabulary(recipe, output_dir).tokens)
    return drafter.train()
