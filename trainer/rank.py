"""One trainer rank, as a Ray actor. The driver imports this module too, so torch and DeepSpeed load with the actor."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from services.contracts import TableSignature
from services.memory import keep_freed_memory
from trainer.coordinator_client import CoordinatorClient
from trainer.figures import TrainResult
from trainer.recipe import Recipe

if TYPE_CHECKING:
    from torch.distributed import TCPStore


class TrainerRank:
    """One rank of a trainer group. Construct all of them, open the store on rank 0, then call `train` on all.

    Args:
        rank: Number of this rank; 0 opens the store, writes what is written once, and speaks for the group.
        recipe: The run's recipe, with the drafter's settings resolved for the target.
        redis_urls: The Redis of each replay shard; telemetry goes to the first.
        prefix: What their keys begin with.
        signature: The table's.
        coordinator: Handle of the coordinator's actor.
        output_dir: The run's directory.
        resume_from: Folder of the checkpoint to go on from; None starts anew.
        generation: Number of this trainer group.
        command: The run's command line, for the provenance.
    """

    def __init__(
        self,
        rank: int,
        recipe: Recipe,
        redis_urls: Sequence[str],
        prefix: str,
        signature: TableSignature,
        coordinator: Any,
        output_dir: str,
        resume_from: str | None,
        generation: int,
        command: Sequence[str] = (),
    ) -> None:
        keep_freed_memory()
        from trainer.training import load_libraries

        self._rank = rank
        self._recipe = recipe
        self._redis = (redis_urls, prefix)
        self._signature = signature
        self._coordinator = CoordinatorClient(coordinator, rank, generation)
        self._output_dir = Path(output_dir)
        self._resume_from = Path(resume_from) if resume_from else None
        self._generation = generation
        self._command = command
        self._store: TCPStore | None = None
        load_libraries(recipe.trainer)  # seconds that pass while the targets load

    def open_store(self) -> str:
        """Open the store where the ranks of this group meet, for rank 0 only; returns ``host:port``."""
        from trainer.distributed import LOOPBACK, open_store

        alone = sum(node["Alive"] for node in ray.nodes()) == 1
        host = LOOPBACK if alone else ray.util.get_node_ip_address()
        self._store = open_store(host, self._recipe.trainer.world_size)
        return f"{host}:{self._store.port}"

    def train(self, store_address: str) -> TrainResult:
        """Train until the coordinator grants no more steps; returns after the last checkpoint is published.

        Args:
            store_address: What rank 0's `open_store` returned.

        Raises:
            SlipstreamError: Something the user can act on.
        """
        from trainer.distributed import connect_store
        from trainer.training import train

        store = self._store or connect_store(store_address, self._recipe.trainer.world_size)
        with self._coordinator:
            return train(
                store,
                self._rank,
                self._recipe,
                *self._redis,
                signature=self._signature,
                coordinator=self._coordinator,
                output_dir=self._output_dir,
                resume_from=self._resume_from,
                generation=self._generation,
                command=self._command,
            )
