"""Where decoding spends its time."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

from services.contracts import Record

if TYPE_CHECKING:
    import torch

Phase = Literal["prefill", "draft", "verify"]

PHASES = ("prefill_s", "draft_s", "verify_s", "overhead_s")
"""The times of a `Timing`."""


class Timing(Record):
    """Wall time of decoding, in seconds, and the tokens that it gave."""

    prefill_s: float
    """The target over the prompts."""
    draft_s: float
    """The drafter: its cache over the prompts and what was verified, and its proposals."""
    verify_s: float
    """The target over anchors and drafts; in plain decoding, over single tokens."""
    overhead_s: float
    """All the rest: masks and positions of rows, acceptance, bookkeeping, copies between devices."""
    num_tokens: int
    """New tokens, cut to the limit and after stop tokens."""

    @property
    def total_s(self) -> float:
        """All of it."""
        return self.prefill_s + self.draft_s + self.verify_s + self.overhead_s

    @property
    def token_s(self) -> float:
        """Seconds a token."""
        return self.total_s / self.num_tokens


def total(timings: Iterable[Timing]) -> Timing:
    """Several parts of a run as one."""
    parts = list(timings)
    return Timing(**{name: sum(getattr(part, name) for part in parts) for name in Timing.model_fields})


class PhaseClock:
    """Adds up what each phase takes. On a GPU it waits for the device where phases begin and end.

    Args:
        device: What the phases run on.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._phases: dict[str, float] = defaultdict(float)
        self._total_s = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Time everything inside; phases are parts of it."""
        began_s = self._now_s()
        try:
            yield
        finally:
            self._total_s += self._now_s() - began_s

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """Time one phase."""
        began_s = self._now_s()
        try:
            yield
        finally:
            self._phases[name] += self._now_s() - began_s

    def timing(self, num_tokens: int) -> Timing:
        """What was timed so far.

        Args:
            num_tokens: New tokens that came of it.
        """
        prefill_s, draft_s, verify_s = (self._phases[name] for name in ("prefill", "draft", "verify"))
        return Timing(
            prefill_s=prefill_s,
            draft_s=draft_s,
            verify_s=verify_s,
            overhead_s=max(0.0, self._total_s - prefill_s - draft_s - verify_s),
            num_tokens=num_tokens,
        )

    def _now_s(self) -> float:
        if self._device.type == "cuda":
            import torch

            torch.cuda.synchronize(self._device)
        return time.perf_counter()
