"""The training loop: sample, forward, backward, ack, step, report, publish."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from services.contracts import StepReport
from services.errors import SlipstreamError
from services.logs import set_step
from trainer.collate import MicroBatch
from trainer.distributed import set_learning_rate, sum_over_neighbours, sum_over_ranks
from trainer.figures import RunFigures, StepTally, TrainResult
from trainer.prefetch import Prefetcher
from trainer.recipe import TrainerConfig
from trainer.saving import CheckpointWriter
from trainer.schedule import learning_rate_factor

logger = logging.getLogger(__name__)


class CoordinatorSide(Protocol):
    """What the loop asks of the coordinator."""

    def report(self, report: StepReport) -> None:
        """Say that a step is done; does not wait for an answer."""
        ...

    def ledger_at(self, step: int) -> str:
        """The ledger after a step, as JSON lines."""
        ...

    def saved(self, step: int) -> None:
        """The checkpoint of a step is visible."""
        ...


@dataclass
class TrainingLoop:
    """One rank's training, from the first granted step to END.

    Attributes:
        engine: DeepSpeed engine around the drafter.
        batches: Where micro-batches come from.
        ack: Ends the leases of a micro-batch and frees its bytes.
        coordinator: Hears of each step, and gives the ledger for a checkpoint.
        checkpoints: Writes them.
        emit: Sends telemetry; never blocks.
        config: The recipe's trainer section.
        rank: This rank.
        generation: Of the trainer group.
        total_steps: Steps of the whole run, for the schedule.
        done_steps: Steps of earlier attempts.
        figures: Adds this attempt up.
        update_priorities: Hears how much of each sample's drafts was rejected; None where nobody draws by it.
    """

    engine: Any
    batches: Prefetcher[MicroBatch]
    ack: Callable[[MicroBatch], None]
    coordinator: CoordinatorSide
    checkpoints: CheckpointWriter
    emit: Callable[..., None]
    config: TrainerConfig
    rank: int
    generation: int
    total_steps: int
    done_steps: int
    figures: RunFigures
    update_priorities: Callable[[MicroBatch, torch.Tensor], None] | None = None

    def run(self) -> TrainResult:
        """Train until END; the last checkpoint is published before this returns.

        Raises:
            SlipstreamError: The loss is no number any more, or the buffer gave nothing before its deadline.
        """
        config, world_size = self.config, self.config.world_size
        step = saved_step = self.done_steps
        reduce = sum_over_neighbours(config.layout.ranks_per_loss)
        started_s = time.perf_counter()
        for granted, micro_batches in self.batches.steps():
            step, tally = granted.step, StepTally(self.rank, world_size)
            set_step(step)
            factor = learning_rate_factor(step, total_steps=self.total_steps, warmup_fraction=config.warmup_fraction)
            set_learning_rate(self.engine, config.learning_rate * factor)
            for index, micro_batch in enumerate(micro_batches, start=1):
                output = self.engine(
                    micro_batch.features,
                    anchor_seeds=micro_batch.anchor_seeds,
                    sample_weights=micro_batch.sample_weights,
                    importance_weights=micro_batch.importance_weights,
                    reduce=reduce,
                )
                self.engine.set_gradient_accumulation_boundary(index == granted.num_micro_batches)
                # A step is the mean of its losses, of which ranks hold parts, but DeepSpeed averages over ranks.
                loss = output.loss * (world_size / config.layout.num_losses(granted))
                self.engine.backward(loss, scale_wrt_gas=False)
                self.ack(micro_batch)
                if self.update_priorities is not None:
                    self.update_priorities(micro_batch, output.rejections)
                self.engine.step()
                tally.add(output.metrics, micro_batch.leases, micro_batch.num_tokens)
            self._finish_step(step, tally, time.perf_counter() - started_s - self.batches.take_paused_s())
            if step % config.checkpoint_every == 0:
                self._write_checkpoint(step)
                saved_step = step
            started_s = time.perf_counter()
        if step > saved_step:
            self._write_checkpoint(step)
        return self.figures.result(steps=step)

    def _write_checkpoint(self, step: int) -> None:
        self.checkpoints.write(self.engine, step, self.coordinator.ledger_at, self.figures.last_losses)
        self.coordinator.saved(step)
        logger.info("the checkpoint of step %d is written", step)

    def _finish_step(self, step: int, tally: StepTally, step_s: float) -> None:
        """Combine the ranks' figures and tell coordinator and telemetry."""
        mine = tally.vector(wait_s=self.batches.take_wait_s(), step_s=step_s)
        total = sum_over_ranks(torch.tensor(mine, dtype=torch.float64, device=self.engine.device)).tolist()
        figures = tally.figures(total)
        loss = figures.metrics.get("loss", 0.0)
        if not math.isfinite(loss):
            raise SlipstreamError(
                f"the loss of step {step} is {loss}: training has diverged. Lower trainer.learning_rate or "
                "trainer.gradient_clip; the last checkpoint is unharmed"
            )
        self.figures.add(figures)
        is_first = self.rank == 0
        self.coordinator.report(
            StepReport(
                step=step,
                rank=self.rank,
                generation=self.generation,
                uses=tuple(tally.uses),
                num_tokens=tally.num_tokens,
                metrics=figures.metrics if is_first else {},
            )
        )
        if is_first:
            self.emit(
                "step",
                step=step,
                total_steps=self.total_steps,
                metrics=figures.metrics,
                learning_rate=self.engine.optimizer.param_groups[0]["lr"],
                samples=figures.num_samples,
                tokens=figures.num_tokens,
                tokens_per_s=figures.num_tokens / figures.step_s,
                wait_s=figures.wait_s,
                step_s=figures.step_s,
                wait_fraction=self.figures.wait_fraction,
            )
