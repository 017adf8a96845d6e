"""The plan of a run: which prompt is captured when, and how uses are numbered.

With N prompts, capture c belongs to epoch e = c // N and is the (c mod N)-th of that epoch's own permutation of the
prompts. It feeds the uses c · reuse + k, k < reuse. Plan order is ascending number.
"""

from __future__ import annotations

import hashlib
import random
from array import array
from functools import lru_cache

from services.contracts import Use
from services.errors import PromptError

MAX_USES = 10**9
"""Of a plan: its ledger keeps a byte for each."""

CACHED_EPOCHS = 2
"""Permutations kept: a run is in one epoch, or passes from one to the next."""


class Plan:
    """The numbering of captures and uses; the same arguments give the same plan everywhere."""

    def __init__(self, num_prompts: int, epochs: int, reuse: int, seed: int) -> None:
        for name, value in (("num_prompts", num_prompts), ("epochs", epochs), ("reuse", reuse)):
            if value < 1:
                raise ValueError(f"a plan needs {name} of at least 1, not {value}")
        if num_prompts * epochs * reuse > MAX_USES:
            raise PromptError(
                f"{num_prompts} prompts, prompts.epochs {epochs} and replay.reuse {reuse} make a plan of more than "
                f"{MAX_USES} uses: lower one of the two"
            )
        self.num_prompts = num_prompts
        self.epochs = epochs
        self.reuse = reuse
        self.seed = seed
        self._order = lru_cache(CACHED_EPOCHS)(self._shuffle)

    @property
    def num_captures(self) -> int:
        """Captures of the whole plan."""
        return self.num_prompts * self.epochs

    @property
    def num_uses(self) -> int:
        """Uses of the whole plan."""
        return self.num_captures * self.reuse

    def capture(self, number: int) -> tuple[int, int]:
        """(prompt, epoch) of a capture."""
        if not 0 <= number < self.num_captures:
            raise IndexError(f"capture {number} is outside the plan's {self.num_captures}")
        epoch, place = divmod(number, self.num_prompts)
        return self._order(epoch)[place], epoch

    def _shuffle(self, epoch: int) -> array[int]:
        order = array("L", range(self.num_prompts))
        random.Random(f"plan/{self.seed}/{epoch}").shuffle(order)
        return order


def anchor_seed(seed: int, use: Use) -> int:
    """Seed of a use's anchors, in [0, 2**63): from what is trained, not from who trains it or when."""
    return _number(f"anchors/{seed}/{use.prompt}/{use.epoch}/{use.k}")


def answer_seed(seed: int, prompt: int) -> int:
    """Seed of the target's own answer to a prompt, in [0, 2**63): the same in every epoch and attempt."""
    return _number(f"answer/{seed}/{prompt}")


def _number(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
