"""What the ranks write into a checkpoint and read back from it (specs: checkpoints, "Training checkpoints").

Every rank writes its own part of the DeepSpeed state; rank 0 writes the rest and publishes.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from torch import Tensor

from drafters.checkpoint import save_drafter
from drafters.drafter import Drafter
from services.errors import CheckpointError
from trainer.checkpoint import LEDGER, checkpoint_step, partial_path, prune, publish, start_partial
from trainer.provenance import collect_provenance
from trainer.recipe import Recipe

ENGINE_FOLDER = "deepspeed"
ENGINE_TAG = "state"
RNG = "rng.pt"
LAST_LOSSES = "last_losses"


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
        engine.save_checkpoint(
            str(partial / ENGINE_FOLDER),
            tag=ENGINE_TAG,
            client_state={LAST_LOSSES: list(last_losses)},
            save_latest=False,
            exclude_frozen_parameters=True,
        )
        rng = _gather_rng(engine.device)
        with _whole_parameters(engine):
            if self._rank == 0:
                save_drafter(engine.module, partial)
        if self._rank == 0:
            torch.save(rng, partial / RNG)
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
    """Bring engine, optimizer and random generators to where a checkpoint left them.

    Returns:
        The losses of the last steps before it.

    Raises:
        CheckpointError: Parts are missing, or another number of ranks wrote it.
    """
    rng_file, engine_folder = checkpoint / RNG, checkpoint / ENGINE_FOLDER
    if not rng_file.is_file() or not engine_folder.is_dir():
        raise CheckpointError(
            f"checkpoint {checkpoint} lacks {RNG} or {ENGINE_FOLDER}/: nothing can resume from it; point step_latest "
            "to an older step_<N>, or remove it to start anew"
        )
    rng: dict[str, list[Tensor]] = torch.load(rng_file, weights_only=True)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if len(rng["cpu"]) != world_size:
        raise CheckpointError(
            f"checkpoint {checkpoint} was written by {len(rng['cpu'])} ranks, this run has {world_size}; "
            f"set trainer.world_size={len(rng['cpu'])}"
        )
    loaded, client_state = engine.load_checkpoint(str(engine_folder), tag=ENGINE_TAG, load_module_strict=False)
    if loaded is None:
        raise CheckpointError(f"DeepSpeed finds no state in {engine_folder}; point step_latest to an older step_<N>")
    if engine.global_steps != checkpoint_step(checkpoint):
        raise CheckpointError(f"{checkpoint} holds the state after {engine.global_steps} steps, not what its name says")
    torch.set_rng_state(rng["cpu"][rank])
    if engine.device.type == "cuda":
        torch.cuda.set_rng_state(rng["cuda"][rank], engine.device)
    last_losses: list[float] = client_state[LAST_LOSSES]
    return last_losses


def _gather_rng(device: torch.device) -> dict[str, list[Tensor]]:
    """Random states by kind and rank, uint8 on the CPU."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return {name: _gather(state.to(device)) for name, state in states.items()}


def _gather(state: Tensor) -> list[Tensor]:
    gathered = [torch.empty_like(state) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, state)
    return [part.cpu() for part in gathered]


def _whole_parameters(engine: Any) -> contextlib.AbstractContextManager[Any]:
    """ZeRO stage 3 leaves each rank a part of every parameter: within this context they are whole."""
    if engine.zero_optimization_stage() < 3:
        return contextlib.nullcontext()
    import deepspeed

    gathered: contextlib.AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(
        list(engine.module.parameters())
    )
    return gathered
