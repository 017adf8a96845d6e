"""A rank's account: what it was granted, holds in memory and has done, for a coordinator that begins anew beside it.

A use is in the rank's hands from the moment its features are in memory (`hold`) until its step is reported. A sample
counts as held only if its table still stands when the last byte has come: `answer` names the tables that count from
then on, so a sample is in the account or refused afterwards, never both nor neither.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from typing import TypeVar

from services.contracts import RankAccount, SampleLease, SampleNote, StepLease, StepReport

Item = TypeVar("Item")


class Account:
    """Kept by the training and the prefetching thread, and read by the one that hears from the coordinator."""

    def __init__(self, rank: int, generation: int) -> None:
        self._rank = rank
        self._generation = generation
        self._lock = threading.Lock()
        self._incarnations: tuple[str, ...] | None = None
        """Of the only tables whose samples are still taken; None takes those of any."""
        self._leases: dict[int, StepLease] = {}
        self._reports: dict[int, StepReport] = {}
        self._held: set[int] = set()
        self._notes: dict[int, SampleNote] = {}  # by use
        self._checkpoint_step = 0

    def grant(self, lease: StepLease) -> None:
        """The coordinator has granted this step."""
        with self._lock:
            self._leases[lease.step] = lease

    def hold(self, leases: Sequence[SampleLease]) -> bool:
        """The samples of these leases are in memory.

        Returns:
            False if one of their tables does not count any more: drop them all, what is lost is captured again.
        """
        with self._lock:
            known = self._incarnations
            if known is not None and any(lease.incarnation not in known for lease in leases):
                return False
            for lease in leases:
                job = lease.sample.job
                self._held.add(lease.use)
                self._notes[lease.use] = SampleNote(
                    capture=job.capture,
                    prompt=job.prompt,
                    attempt=job.attempt,
                    num_tokens=job.num_tokens,
                    num_bytes=lease.sample.num_bytes,
                )
            return True

    def report(self, report: StepReport) -> None:
        """A step is done; call it before the coordinator hears of it."""
        with self._lock:
            self._reports[report.step] = report
            self._leases.pop(report.step, None)
            self._held.difference_update(report.uses)

    def saved(self, step: int) -> None:
        """The checkpoint of a step is visible: what the one before it has is forgotten."""
        with self._lock:
            kept_from, self._checkpoint_step = self._checkpoint_step, step
            for old in [number for number in self._reports if number <= kept_from]:
                for use in self._reports.pop(old).uses:
                    self._notes.pop(use, None)

    def answer(self, incarnations: tuple[str, ...]) -> RankAccount:
        """The account; from now on only samples of these tables are taken."""
        with self._lock:
            self._incarnations = incarnations
            return RankAccount(
                rank=self._rank,
                generation=self._generation,
                incarnations=incarnations,
                leases=_in_order(self._leases),
                reports=_in_order(self._reports),
                held=tuple(sorted(self._held)),
                samples=_distinct(self._notes.values()),
            )


def _in_order(by_step: dict[int, Item]) -> tuple[Item, ...]:
    return tuple(by_step[step] for step in sorted(by_step))


def _distinct(notes: Iterable[SampleNote]) -> tuple[SampleNote, ...]:
    newest = {(note.capture, note.attempt): note for note in notes}
    return tuple(newest[key] for key in sorted(newest))
