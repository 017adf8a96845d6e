"""What the ranks write into a checkpoint and read back from it (specs: checkpoints, "Training checkpoints").

All ranks give their part of the training state; rank 0 writes and publishes.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError

from drafters.checkpoint import save_drafter
from drafters.drafter import Drafter
from services.errors import CheckpointError
from trainer.checkpoint import LEDGER, checkpoint_step, partial_path, prune, publish, start_partial
from trainer.distributed import sum_over_ranks
from trainer.provenance import collect_provenance
from trainer.recipe import Recipe
from trainer.training_state import KINDS, gather, read_state, write_figures, write_tensors


class CheckpointWriter:
    """Writes the checkpoints of one run; every rank has one and calls `write` at the same step.

    Args:
        output_dir: The run's directory, on a file system that all ranks share.
        recipe: Saved with each checkpoint; says how many to keep.
        rank: This rank.
        command: The run's command line, for the provenance.
        fingerprint: The target's, likewise.
    """

    def __init__(
        self, output_dir: Path, recipe: Recipe, rank: int, command: Sequence[str], fingerprint: str | None = None
    ) -> None:
        self._fingerprint = fingerprint
        self._output_dir = output_dir
        self._recipe = recipe
        self._rank = rank
        self._command = command

    def write_untrained(self, drafter: Drafter) -> None:
        """Publish step_0: the drafter alone, so that decoding can measure the start. Rank 0 only.

        Raises:
            CheckpointError: It cannot be written.
        """
        writing = _Writing(self._output_dir, 0, is_writer=True)
        writing.do(lambda: start_partial(self._output_dir, 0))
        writing.do(lambda: save_drafter(drafter, writing.partial))
        writing.do(lambda: self._write_origin(writing.partial))
        writing.do(lambda: publish(self._output_dir, 0, latest=False))
        writing.check()

    def write(self, engine: Any, step: int, ledger: Callable[[int], str], last_losses: Sequence[float]) -> None:
        """Publish the checkpoint of a step. All ranks call it; it returns once the checkpoint is visible.

        Args:
            engine: The DeepSpeed engine around the drafter.
            step: Optimizer steps done.
            ledger: Gives the ledger's text after a step; only rank 0 asks.
            last_losses: What a resumed run goes on averaging its final loss from.

        Raises:
            CheckpointError: It cannot be written. Nothing of it is published, and every rank raises.
        """
        writing = _Writing(self._output_dir, step, is_writer=self._rank == 0)
        writing.do(lambda: start_partial(self._output_dir, step))
        for kind in KINDS:
            tensors = gather(engine, kind)
            writing.do(partial(write_tensors, writing.partial, kind, tensors))
        with _whole_parameters(engine):
            writing.do(lambda: save_drafter(engine.module, writing.partial))
        writing.do(lambda: write_figures(writing.partial, engine, step=step, last_losses=last_losses))
        lines = ledger(step) if self._rank == 0 else ""
        writing.do(lambda: (writing.partial / LEDGER).write_text(lines, encoding="utf-8"))
        writing.do(lambda: self._write_origin(writing.partial))
        writing.do(lambda: publish(self._output_dir, step))
        writing.do(lambda: prune(self._output_dir, self._recipe.trainer.keep_checkpoints))
        writing.agree(engine.device)

    def _write_origin(self, folder: Path) -> None:
        (folder / "recipe.yaml").write_text(yaml.safe_dump(self._recipe.model_dump(mode="json"), sort_keys=False))
        target = {
            "model": self._recipe.target.model,
            "fingerprint": self._fingerprint,
            "enable_thinking": self._recipe.prompts.enable_thinking,
        }
        provenance = collect_provenance(self._command) | {"target": target}
        (folder / "provenance.json").write_text(json.dumps(provenance, indent=2) + "\n")


class _Writing:
    """The writing of one checkpoint by rank 0. After a failure nothing more is written, and what was is removed.

    The other ranks take part in what needs all of them up to the end, where each learns of the failure: a rank that
    left early would be an error of the network to the rest.
    """

    def __init__(self, output_dir: Path, step: int, *, is_writer: bool) -> None:
        self.partial = partial_path(output_dir, step)
        self._step = step
        self._is_writer = is_writer
        self._errno = 0

    def do(self, write: Callable[[], object]) -> None:
        """Write something, on rank 0 and if everything before went well."""
        if not self._is_writer or self._errno:
            return
        try:
            write()
        except (OSError, SafetensorError) as error:
            self._errno = _errno_of(error)
            shutil.rmtree(self.partial, ignore_errors=True)  # it may fill the disk

    def agree(self, device: torch.device) -> None:
        """Tell all ranks how it went.

        Raises:
            CheckpointError: Something could not be written.
        """
        self._errno = int(sum_over_ranks(torch.tensor([self._errno], device=device)).item())
        self.check()

    def check(self) -> None:
        """Raise `CheckpointError` if something could not be written."""
        if self._errno:
            raise CheckpointError(
                f"cannot write the checkpoint of step {self._step} to {self.partial.parent}: "
                f"{os.strerror(self._errno)}. What is not whole of it is removed, and earlier checkpoints are "
                "unharmed: make room, or lower trainer.keep_checkpoints, and give the same command again"
            )


def _errno_of(error: OSError | SafetensorError) -> int:
    """The system's number for what went wrong; safetensors has it in its text alone."""
    if isinstance(error, OSError):
        return error.errno or errno.EIO
    number = re.search(r"os error (\d+)", str(error))
    return int(number[1]) if number else errno.EIO


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
