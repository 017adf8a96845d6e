"""The actors of a run: what each is given and where it is placed. When, and when again, is the job's decision."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from services.answers import answers_of
from services.placement import on_this_node
from services.prompts.coordinator import Coordinator, CoordinatorSettings
from services.replay.shard import ReplayShard
from services.security import Credentials
from trainer.checkpoint import LEDGER
from trainer.cluster import Part, start_part
from trainer.group import RankGroup
from trainer.output import OutputDir
from trainer.preparation import Preparation
from trainer.rank import TrainerRank

LOOKAHEAD = 2
"""Captures in the work queue for each one that the shard pulls at once."""


@dataclass(frozen=True)
class Beginning:
    """From where a coordinator begins.

    Attributes:
        generation: The trainer group that it grants steps to.
        checkpoint: Whose ledger it goes on from; None begins at step 0.
        joins: Whether the ranks are at work already.
        is_paused: Whether no step is granted until the run continues.
        is_stopped: Whether none is granted any more.
    """

    generation: int
    checkpoint: Path | None
    joins: bool = False
    is_paused: bool = False
    is_stopped: bool = False

    @property
    def ledger(self) -> str | None:
        """Path of the ledger."""
        return str(self.checkpoint / LEDGER) if self.checkpoint else None


class Parts:
    """Starts the actors of one attempt of a run and keeps them until they are dropped.

    Args:
        prepared: The run.
        output: Its directory.
        where: The URLs of its Redis, one a shard, and the key prefix in them.
        credentials: For the targets.
    """

    def __init__(
        self, prepared: Preparation, output: OutputDir, where: tuple[tuple[str, ...], str], credentials: Credentials
    ) -> None:
        self._prepared = prepared
        self._recipe = prepared.for_actors()
        self._output = output
        self._where = where
        self._credentials = credentials
        self._parts: list[Part] = []

    def shard(self, number: int) -> Part:
        """A replay shard, beside the embedded Redis."""
        urls, prefix = self._where
        return self._start(
            ReplayShard,
            urls[number],
            prefix,
            self._recipe.replay.of_one_shard(),
            self._prepared.signature,
            answers_of(self._output.answers, number),
            self._credentials.for_client(),
            urls[0] if number else None,
            max_concurrency=4,
            log=self._output.log_place("shard", number if len(urls) > 1 else None),
            scheduling_strategy=on_this_node(),
        )

    def coordinator(self, beginning: Beginning) -> Part:
        """The coordinator. Ray gives it a new process when it loses its own, which then waits for `begin`."""
        return self._start(
            Coordinator,
            *self.coordinator_arguments(beginning),
            # Every rank may wait for a lease and give its account while the driver asks and attends.
            max_concurrency=3 * self._recipe.trainer.world_size + 6,
            max_restarts=-1,
            log=self._output.log_place("coordinator"),
        )

    def coordinator_arguments(self, beginning: Beginning) -> tuple[Any, ...]:
        """What `begin` of a coordinator takes."""
        recipe, trainer = self._recipe, self._recipe.trainer
        settings = CoordinatorSettings(
            reuse=recipe.replay.reuse,
            last_rows=self._prepared.last_rows,
            world_size=trainer.world_size,
            micro_batch_size=trainer.layout.samples_per_pass,
            accumulation=trainer.layout.num_passes,
            max_steps=trainer.max_steps,
            deterministic=trainer.deterministic,
            tail=trainer.tail,
            signature=self._prepared.signature,
            lookahead_captures=LOOKAHEAD * recipe.replay.pulls,
            capture_log=str(self._output.capture_log),
            answers=str(self._output.answers),
            lives=str(self._output.lives),
            ledger=beginning.ledger,
            generation=beginning.generation,
            num_shards=recipe.replay.shards,
            joins=beginning.joins,
            is_paused=beginning.is_paused,
            is_stopped=beginning.is_stopped,
        )
        return recipe.prompts, str(self._prepared.target_folder), *self._where, settings

    def group(self, coordinator: Part, generation: int, checkpoint: Path | None) -> RankGroup:
        """All trainer ranks, to begin from a checkpoint."""
        ranks = [
            self._start(
                TrainerRank,
                rank,
                self._recipe,
                *self._where,
                self._prepared.signature,
                coordinator.actor,
                str(self._output.path),
                str(checkpoint) if checkpoint else None,
                generation,
                sys.argv,
                ask=self._recipe.trainer.ask,
                log=self._output.log_place("trainer", rank),
            )
            for rank in range(self._recipe.trainer.world_size)
        ]
        return RankGroup(ranks)

    @property
    def all(self) -> list[Part]:
        """Those that were started and not dropped."""
        return list(self._parts)

    def drop(self, *parts: Part) -> None:
        """End these at once."""
        for part in parts:
            ray.kill(part.actor)
            self._parts.remove(part)

    def end(self) -> None:
        """End all that are left. Again: nothing happens."""
        self.drop(*self._parts)

    def _start(self, cls: type, *args: Any, **options: Any) -> Part:
        part = start_part(cls, *args, **options)
        self._parts.append(part)
        return part
