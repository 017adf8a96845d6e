"""What the ranks write into a checkpoint and read back from it (specs: checkpoints, "Training checkpoints").

All ranks give their part of the training state; rank 0 writes and publishes.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
import yaml

from drafters.checkpoint import save_drafter
from drafters.drafter import Drafter
from services.errors import CheckpointError
from trainer.checkpoint import LEDGER, checkpoint_step, partial_path, prune, publish, start_partial
from trainer.provenance import collect_provenance
from trainer.recipe import Recipe
from trainer.training_state import read_state, write_state


class CheckpointWriter:
    """Writes the checkpoints of one run; every rank has one and calls `write` at the same step.

    Args:
        output_dir: The run's directory, on a file system that all ranks share.
        recipe: Saved with each checkpoint; says how many to keep.
        rank: This rank.
        command: The run's command line, for the provenance.
    """

    def __init__(self, output_dir: Path, recipe: Recipe, rank: int, command: Sequence[str]) -> None:
        self._output_dir = output_dir
        self._recipe = recipe
        self._rank = rank
        self._command = command

    def write_untrained(self, drafter: Drafter) -> None:
        """Publish step_0: the drafter alone, so that decoding can measure the start. Rank 0 only."""
        partial = start_partial(self._output_dir, 0)
        save_drafter(drafter, partial)
        self._write_origin(partial)
        publish(self._output_dir, 0, latest=False)

    def write(self, engine: Any, step: int, ledger: Callable[[int], str], last_losses: Sequence[float]) -> None:
        """Publish the checkpoint of a step. All ranks call it; it returns once the checkpoint is visible.

        Args:
            engine: The DeepSpeed engine around the drafter.
            step: Optimizer steps done.
            ledger: Gives the ledger's text after a step; only rank 0 asks.
            last_losses: What a resumed run goes on averaging its final loss from.
        """
        partial = partial_path(self._output_dir, step)
        if self._rank == 0:
            start_partial(self._output_dir, step)
        dist.barrier()
        write_state(engine, partial, step=step, last_losses=tuple(last_losses))
        with _whole_parameters(engine):
            if self._rank == 0:
                save_drafter(engine.module, partial)
        if self._rank == 0:
            (partial / LEDGER).write_text(ledger(step))
            self._write_origin(partial)
        dist.barrier()
        if self._rank == 0:
            publish(self._output_dir, step)
            prune(self._output_dir, self._recipe.trainer.keep_checkpoints)
        dist.barrier()

    def _write_origin(self, folder: Path) -> None:
        (folder / "recipe.yaml").write_text(yaml.safe_dump(self._recipe.model_dump(mode="json"), sort_keys=False))
        (folder / "provenance.json").write_text(json.dumps(collect_provenance(self._command), indent=2) + "\n")


def restore(engine: Any, checkpoint: Path) -> list[float]:
    """Bring a fresh engine to where a checkpoint left its run, however many ranks wrote it.

    Returns:
        The losses of the last steps before it.

    Raises:
        CheckpointError: Parts are missing or cut short, or of another drafter.
    """
    figures = read_state(engine, checkpoint)
    if figures.step != checkpoint_step(checkpoint):
        raise CheckpointError(f"{checkpoint} holds the state after {figures.step} steps, not what its name says")
    engine.global_steps = figures.step
    return list(figures.last_losses)


def _whole_parameters(engine: Any) -> contextlib.AbstractContextManager[Any]:
    """ZeRO stage 3 leaves each rank a part of every parameter: within this context they are whole."""
    if engine.zero_optimization_stage() < 3:
        return contextlib.nullcontext()
    import deepspeed

    gathered: contextlib.AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(
        list(engine.module.parameters())
    )
    return gathered
