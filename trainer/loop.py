"""The training loop: sample, forward, backward, ack, step, report, publish."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from services.contracts import StepReport
from services.errors import SlipstreamError
from trainer.collate import MicroBatch
from trainer.distributed import set_learning_rate, sum_over_ranks
from trainer.prefetch import Prefetcher
from trainer.recipe import TrainerConfig
from trainer.result import TrainResult
from trainer.saving import CheckpointWriter
from trainer.schedule import learning_rate_factor
from trainer.tally import StepFigures, StepTally

FINAL_LOSS_STEPS = 10
"""The final loss is the mean over this many last steps: one step's loss is mostly noise."""


class CoordinatorSide(Protocol):
    """What the loop asks of the coordinator."""

    def report(self, report: StepReport) -> None:
        """Say that a step is done; does not wait for an answer."""
        ...

    def ledger_at(self, step: int) -> str:
        """The ledger after a step, as JSON lines."""
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
    done_steps: int = 0
    _run: RunFigures = field(default_factory=lambda: RunFigures())

    def run(self) -> TrainResult:
        """Train until END; the last checkpoint is published before this returns.

        Raises:
            SlipstreamError: The loss is no number any more, or the buffer gave nothing before its deadline.
        """
        config, world_size = self.config, self.config.world_size
        step = saved_step = self.done_steps
        started_s = time.perf_counter()
        for granted, micro_batches in self.batches.steps():
            step, tally = granted.step, StepTally(self.rank, world_size)
            factor = learning_rate_factor(step, total_steps=self.total_steps, warmup_fraction=config.warmup_fraction)
            set_learning_rate(self.engine, config.learning_rate * factor)
            for index, micro_batch in enumerate(micro_batches, start=1):
                output = self.engine(
                    micro_batch.features,
                    anchor_seeds=micro_batch.anchor_seeds,
                    sample_weights=micro_batch.sample_weights,
                    reduce=sum_over_ranks,
                )
                self.engine.set_gradient_accumulation_boundary(index == granted.num_micro_batches)
                # The losses of the ranks add up to the global one, but DeepSpeed averages gradients over ranks.
                loss = output.loss * (world_size / granted.num_micro_batches)
                self.engine.backward(loss, scale_wrt_gas=False)
                self.ack(micro_batch)
                self.engine.step()
                tally.add(output.metrics, micro_batch.leases, micro_batch.num_tokens)
            self._finish_step(step, tally, time.perf_counter() - started_s)
            if step % config.checkpoint_every == 0:
                self.checkpoints.write(self.engine, step, self.coordinator.ledger_at)
                saved_step = step
            started_s = time.perf_counter()
        if step > saved_step:
            self.checkpoints.write(self.engine, step, self.coordinator.ledger_at)
        return self._run.result(first_step=self.done_steps + 1, steps=step)

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
        self._run.add(figures)
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
                wait_fraction=self._run.wait_fraction,
            )


class RunFigures:
    """What one attempt adds up to. The first step's wait is kept apart: it waits for the buffer to fill."""

    def __init__(self) -> None:
        self._num_steps = 0
        self._tokens = 0
        self._first_fill_s = 0.0
        self._wait_s = 0.0
        self._step_s = 0.0
        self._last_losses: deque[float] = deque(maxlen=FINAL_LOSS_STEPS)

    def add(self, figures: StepFigures) -> None:
        """Add one step."""
        self._num_steps += 1
        self._tokens += figures.num_tokens
        if "loss" in figures.metrics:
            self._last_losses.append(figures.metrics["loss"])
        if self._num_steps == 1:
            self._first_fill_s = figures.wait_s
            return
        self._wait_s += figures.wait_s
        self._step_s += figures.step_s

    @property
    def wait_fraction(self) -> float | None:
        """Part of the time after the first step that was spent waiting; None before there is any."""
        return self._wait_s / self._step_s if self._num_steps > 1 else None

    def result(self, *, first_step: int, steps: int) -> TrainResult:
        """The figures as a record."""
        losses = self._last_losses
        return TrainResult(
            first_step=first_step,
            steps=steps,
            final_loss=sum(losses) / len(losses) if losses else None,
            tokens=self._tokens,
            first_fill_s=self._first_fill_s,
            wait_s=self._wait_s,
            step_s=self._step_s,
        )
