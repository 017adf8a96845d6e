"""Decodes the samples of a comparison with each drafter and by the target alone, or goes on with that. No torch.

    <folder>/decoded/plain/              records of the target alone
    <folder>/decoded/<name>-<digest>/    records of a drafter

Drafters take turns piece by piece, and another one begins with each piece: whatever else the machine does meanwhile
slows all of them alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from itertools import chain
from pathlib import Path

from evaluation.benchmark import BenchmarkSettings, PlannedTask
from evaluation.compare.entrants import Match
from evaluation.records import PlainRecord, RecordLog, SampleKey, SampleRecord
from evaluation.session import Decode
from evaluation.work import Work, remaining
from services.contracts import Record
from services.errors import OutputDirError

DECODED = "decoded"
PLAIN = "plain"

StartMatch = Callable[[Sequence[BenchmarkSettings]], AbstractContextManager[Sequence[Decode]]]
"""Starts what decodes with each of some drafters, whose settings differ in nothing else."""

OnRecord = Callable[[str, SampleRecord | PlainRecord], None]
"""Hears whose record there is, by label; `PLAIN` of the target alone."""


class Decoded(Record):
    """All records of a comparison.

    Attributes:
        samples: Of each drafter, by sample, in the order of the match.
        plain: By the target alone; empty if the speedup is not measured.
    """

    samples: tuple[dict[SampleKey, SampleRecord], ...]
    plain: dict[SampleKey, PlainRecord]


def run_match(
    match: Match,
    folder: Path,
    start: StartMatch,
    *,
    piece_size: int,
    begin: Callable[[int, int], None],
    on_record: OnRecord,
) -> Decoded:
    """Decode what a folder lacks of a comparison.

    Args:
        match: From `prepare_match`.
        folder: Where records go; those that are there are not made again.
        start: Starts what decodes; not called where nothing is left to do.
        piece_size: Samples that a drafter decodes before it is the next one's turn.
        begin: Hears how many records are there already, and how many there will be in all.
        on_record: Hears of each new record.

    Raises:
        OutputDirError: The folder holds other things, or records of other settings.
        SlipstreamError: Target or drafters cannot be loaded, or decoding failed.
    """
    settings = [entrant.session.settings for entrant in match.entrants]
    labels = [entrant.label for entrant in match.entrants]
    with ExitStack() as stack:
        decoders: Sequence[Decode] | None = None
        if not (folder / DECODED).is_dir():
            _check_empty(folder)
            decoders = stack.enter_context(start(settings))  # what cannot even be loaded shall leave no folder behind
        logs = [
            stack.enter_context(RecordLog(folder / DECODED / entrant.folder_name, entrant.session.identity))
            for entrant in match.entrants
        ]
        plain = stack.enter_context(RecordLog(folder / DECODED / PLAIN, match.plain_identity))
        turns = _turns(match, logs, plain, piece_size)
        wanted = [sample.key for task in match.tasks for sample in task.samples]
        num_sides = len(logs) + match.settings.measure_speedup
        num_left = sum(work.num_records for _, work in turns)
        begin(num_sides * len(wanted) - num_left, num_sides * len(wanted))

        if turns and decoders is None:
            decoders = stack.enter_context(start(settings))
        for side, work in turns:
            assert decoders is not None
            log, label = (plain, PLAIN) if side is None else (logs[side], labels[side])

            def keep(record: SampleRecord | PlainRecord, log: RecordLog = log, label: str = label) -> None:
                log.add(record)
                on_record(label, record)

            decoders[side or 0]([work], keep)
        return Decoded(
            samples=tuple({key: log.samples[key] for key in wanted} for log in logs),
            plain={key: plain.plain[key] for key in wanted} if match.settings.measure_speedup else {},
        )


def _turns(match: Match, logs: Sequence[RecordLog], plain: RecordLog, piece_size: int) -> list[tuple[int | None, Work]]:
    """What is to be done, in order: by which drafter (None: the target alone), and what."""
    turns: list[tuple[int | None, Work]] = []
    for number, piece in enumerate(chain.from_iterable(_pieces(task, piece_size) for task in match.tasks)):
        found: list[tuple[int | None, Work]] = [
            (side, work)
            for side, log in enumerate(logs)
            for work in remaining([piece], log, measure_speedup=False, piece_size=piece_size)
        ]
        if match.settings.measure_speedup:
            left = remaining([piece], plain, measure_speedup=True, piece_size=piece_size)
            found += [(None, Work(plain=work.plain)) for work in left if work.plain]
        if found:
            first = number % len(found)
            turns += found[first:] + found[:first]
    return turns


def _pieces(task: PlannedTask, size: int) -> list[PlannedTask]:
    samples = task.samples
    return [
        task.model_copy(update={"samples": samples[first : first + size]}) for first in range(0, len(samples), size)
    ]


def _check_empty(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise OutputDirError(f"{folder} is a file: give --output-dir a folder")
    if folder.is_dir() and (others := sorted(entry.name for entry in folder.iterdir())):
        raise OutputDirError(
            f"{folder} holds files that are no comparison ({', '.join(others[:3])}): choose another --output-dir"
        )
