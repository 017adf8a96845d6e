"""What of an evaluation is left to do, cut into pieces that one decoder does at a time. No torch."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Sequence

from evaluation.benchmark import PlannedTask, Sample
from evaluation.records import RecordLog, SampleKey
from services.contracts import Record
from services.errors import OutputDirError

BATCHES_A_PIECE = 4
"""Batches of a piece where there is one decoder: enough that a batch is full most of the time, and few enough that
both sides of the speedup are measured close together."""

BATCHES_A_SHARED_PIECE = 2
"""Where several share them: a piece is what is lost with a replica, and what the last one may be waited for."""


class Work(Record):
    """A piece: samples of one task.

    Attributes:
        speculative: To be decoded with the drafter.
        plain: To be decoded by the target alone.
    """

    speculative: tuple[Sample, ...] = ()
    plain: tuple[Sample, ...] = ()

    @property
    def num_records(self) -> int:
        """Records that it gives."""
        return len(self.speculative) + len(self.plain)


def remaining(tasks: Iterable[PlannedTask], log: RecordLog, *, measure_speedup: bool, piece_size: int) -> list[Work]:
    """What the log lacks, task by task.

    Args:
        tasks: The plan.
        log: What is there.
        measure_speedup: Whether samples are decoded by the target alone, too.
        piece_size: Most samples of a piece.

    Raises:
        OutputDirError: The log has a record of another prompt in the place of one of these.
    """
    works = []
    for task in tasks:
        _check_prompts(task, log)
        for piece in _pieces(task.samples, piece_size):
            speculative = _missing(piece, log.samples)
            plain = _missing(piece, log.plain) if measure_speedup else ()
            if speculative or plain:
                works.append(Work(speculative=speculative, plain=plain))
    return works


def _pieces(samples: Sequence[Sample], size: int) -> Iterator[Sequence[Sample]]:
    return (samples[first : first + size] for first in range(0, len(samples), size))


def _missing(samples: Iterable[Sample], there: Container[SampleKey]) -> tuple[Sample, ...]:
    return tuple(sample for sample in samples if sample.key not in there)


def _check_prompts(task: PlannedTask, log: RecordLog) -> None:
    for sample in task.samples:
        for records in (log.samples, log.plain):
            record = records.get(sample.key)
            if record is not None and record.prompt_hash != sample.prompt_hash:
                raise OutputDirError(
                    f"{log.folder} has sample {sample.index} of {task.name} with another prompt: the prompts were "
                    "changed since. Put them back, or choose another --output-dir"
                )
