"""The trainer ranks of one generation: they begin together, and one that dies ends them all.

A rank that lost a peer waits in a collective for gloo's or NCCL's own time-out, or fails with an error of theirs. So
whenever a rank fails, the others are looked at for one that died, and the survivors are killed, not asked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import ray
import ray.exceptions

from services.errors import PartDiedError
from trainer.cluster import ANSWER_DEADLINE_S, Part, result_of
from trainer.figures import TrainResult

PEER_WAIT_S = 15.0
"""How long after a rank failed the death of another one may still come to light."""


class RankGroup:
    """Ranks that were placed together.

    Args:
        parts: Rank 0 first.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = list(parts)
        self.results: list[TrainResult] = []
        self._training: dict[Any, int] = {}

    def begin(self) -> None:
        """Let the ranks meet and train; all of them have started.

        Raises:
            PartDiedError: Rank 0 is gone.
        """
        first = self.parts[0].actor
        store = result_of(first.open_store.remote(), "trainer rank 0", timeout_s=ANSWER_DEADLINE_S)
        self._training = {part.actor.train.remote(store): rank for rank, part in enumerate(self.parts)}

    @property
    def calls(self) -> list[Any]:
        """The calls that ranks are training in; empty once all have finished."""
        return list(self._training)

    def take(self, call: Any) -> None:
        """Take what a finished call came to.

        Raises:
            PartDiedError: A rank lost its process, this one or another one because of which this one failed.
            SlipstreamError: What the rank raised.
        """
        rank = self._training.pop(call)
        try:
            self.results.append(result_of(call, f"trainer rank {rank}"))
        except PartDiedError:
            raise
        except Exception as error:
            if dead := self._dead_peer():
                raise PartDiedError(f"trainer rank {dead} died, and rank {rank} failed because of it") from error
            raise

    def kill_silent(self, silent_s: Mapping[int, float], most_s: float) -> list[int]:
        """Kill ranks that still train and have been silent for longer than `most_s`; `take` hears of their death.

        Args:
            silent_s: Seconds since the last sign of life, by rank.
            most_s: So much is no reason to worry.

        Returns:
            Those that were killed.
        """
        stuck = [rank for rank in self._training.values() if silent_s.get(rank, 0.0) > most_s]
        for rank in stuck:
            ray.kill(self.parts[rank].actor)
        return stuck

    def _dead_peer(self) -> str:
        """Numbers of ranks that turn out to have died, as text; empty if none has."""
        waiting, dead = dict(self._training), []
        while waiting:
            done, _ = ray.wait(list(waiting), num_returns=1, timeout=PEER_WAIT_S)
            if not done:
                break
            rank = waiting.pop(done[0])
            try:
                ray.get(done[0])
            except ray.exceptions.RayActorError:
                dead.append(str(rank))
            except ray.exceptions.RayTaskError:
                continue  # another survivor
        return ", ".join(dead)
