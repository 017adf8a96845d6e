"""What a drafter's confidence head is worth on a set of prompts: decoded, fitted on one half, judged on the other.

    <folder>/threshold-0, threshold-0.1, …   records of decoding, gone on with by the same command
    <folder>/confidence.json                 all figures
    <folder>/confidence_temperatures.json    the fitted temperatures
    <folder>/reliability.png                 reliability diagrams

No torch: what decodes and what measures is handed in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol

from evaluation import metrics
from evaluation.benchmark import BenchmarkSettings
from evaluation.confidence.calibration import SlotCalibration, calibration
from evaluation.confidence.diagram import write_diagrams
from evaluation.confidence.fitting import fit_temperatures
from evaluation.confidence.rounds import Rounds
from evaluation.confidence.step_times import StepTimes, Throughput, replay
from evaluation.confidence.sweep import SweepPoint, sweep_point
from evaluation.confidence.temperatures import ConfidenceTemperatures
from evaluation.records import RECORDS_FILE, PlainRecord, RecordLog, SampleKey, SampleRecord, read_records
from evaluation.session import HOW, Decode, Session, run
from evaluation.work import BATCHES_A_PIECE
from services.contracts import Record
from services.errors import CheckpointError, PromptError
from services.files import replace_text
from services.reading import first_fault, read_json

STUDY_JSON = "confidence.json"
DIAGRAMS_PNG = "reliability.png"


class StudyPlan(Record):
    """What is looked at.

    Attributes:
        thresholds: Of the sweep; 0 is decoded anyway.
        calibrated_sweep: Whether thresholds are compared with calibrated confidences.
        concurrencies: Numbers of requests whose steps are measured.
    """

    thresholds: tuple[float, ...]
    calibrated_sweep: bool
    concurrencies: tuple[int, ...]


class Study(Record):
    """All figures. Calibration, sweep and throughput are of samples that no temperature was fitted on."""

    target: str
    drafter: str
    decoding_temperature: float
    num_samples_fitted: int
    num_samples_judged: int
    num_rounds_fitted: int
    num_rounds_judged: int
    temperatures: tuple[float, ...]
    """One a position."""
    head: tuple[SlotCalibration, ...]
    """Positions with the head's own confidences."""
    calibrated: tuple[SlotCalibration, ...]
    """The same with the fitted temperatures."""
    calibrated_sweep: bool
    sweep: tuple[SweepPoint, ...]
    step_times: tuple[StepTimes, ...]
    throughput: tuple[Throughput, ...]
    """Replayed, with calibrated confidences."""
    hardware: str
    warnings: tuple[str, ...]
    saved_to: str | None
    """Where the temperatures were saved beside the drafter."""


class Decoder(Protocol):
    """Holds target and drafter."""

    def decoding(self, settings: BenchmarkSettings) -> Decode:
        """Decodes with these settings, whose target and drafter are its own."""

    def step_times(self, num_requests: int, context_tokens: int, tokens_observed: int) -> StepTimes:
        """Measures the steps of so many requests."""


class Watcher(Protocol):
    """Sees how far a study is."""

    def begin(self, stage: str, num_done: int, num_in_all: int) -> None:
        """A stage begins, or goes on."""

    def advance(self) -> None:
        """One more of the stage is done."""


def check_has_head(checkpoint: Path) -> None:
    """Check that a drafter has a confidence head, before anything is loaded.

    Raises:
        CheckpointError: It has none, or is no drafter.
    """
    path = checkpoint / "config.json"
    try:
        config: Any = read_json(path.read_bytes())
    except (OSError, ValueError) as error:
        said = first_fault(error) if isinstance(error, ValueError) else str(error)
        raise CheckpointError(
            f"{checkpoint} is no drafter checkpoint: {said}. Give --drafter a step_<N> folder, or another one in the "
            "native format"
        ) from error
    if not (isinstance(config, dict) and config.get("enable_confidence_head")):
        raise CheckpointError(
            f"the drafter at {checkpoint} has no confidence head, so it has no confidences to look at: train a DSpark "
            "drafter with drafter.algorithm: dspark and drafter.enable_confidence_head: true"
        )


def run_study(
    session: Session,
    plan: StudyPlan,
    folder: Path,
    start: Callable[[], Decoder],
    watcher: Watcher,
    *,
    save_to: Path | None,
    hardware: str,
) -> Study:
    """Decode, fit, judge, sweep and measure; write all files.

    Args:
        session: From `evaluation.session.prepare`, at threshold 0 and without measuring the speedup.
        plan: What is looked at.
        folder: Where files go; decoded records that are there are not made again.
        start: Loads target and drafter.
        watcher: Hears of the progress.
        save_to: The drafter's folder, for its temperatures; None saves them in `folder` alone.
        hardware: What step times are measured on.

    Raises:
        OutputDirError: The folder holds another study.
        PromptError: There are too few samples to fit on some and judge on others.
        SlipstreamError: Target or drafter cannot be loaded, or decoding failed.
    """
    fitted_on, judged_on = halves(session)
    decoder = start()
    records = _decode(session, folder / "threshold-0", decoder, watcher, "threshold 0")
    fit_rounds = _rounds(records, fitted_on, "fit on")
    judged_records = [record for record in records if record.key in judged_on]
    judged = _rounds(records, judged_on, "judge on")
    temperatures = fit_temperatures(fit_rounds)
    fitted = ConfidenceTemperatures(
        temperatures=tuple(temperatures),
        decoding_temperature=session.settings.temperature,
        tasks=tuple(task.name for task in session.tasks),
        num_samples=len(fitted_on),
        num_rounds=fit_rounds.num_rounds,
    )
    fitted.save(folder)
    saved_to = None if save_to is None else str(fitted.save(save_to))

    sweep = [sweep_point(0.0, judged_records, session.settings.seed)]
    for threshold in sorted(set(plan.thresholds) - {0.0}):
        part = _with_threshold(session, threshold, temperatures if plan.calibrated_sweep else None, judged_on)
        found = _decode(part, folder / _folder_name(threshold, plan), decoder, watcher, f"threshold {threshold:g}")
        sweep.append(sweep_point(threshold, found, session.settings.seed))

    step_times = _measure(plan.concurrencies, judged_records, decoder, watcher)
    study = Study(
        target=session.settings.target,
        drafter=session.settings.drafter,
        decoding_temperature=session.settings.temperature,
        num_samples_fitted=len(fitted_on),
        num_samples_judged=len(judged_on),
        num_rounds_fitted=fit_rounds.num_rounds,
        num_rounds_judged=judged.num_rounds,
        temperatures=tuple(temperatures),
        head=tuple(calibration(judged)),
        calibrated=tuple(calibration(judged, temperatures)),
        calibrated_sweep=plan.calibrated_sweep,
        sweep=tuple(sweep),
        step_times=tuple(step_times),
        throughput=tuple(replay(judged, times, temperatures) for times in step_times),
        hardware=hardware,
        warnings=session.warnings,
        saved_to=saved_to,
    )
    replace_text(folder / STUDY_JSON, study.model_dump_json(indent=2) + "\n")
    title = (
        f"{Path(study.drafter).name}: {study.num_rounds_judged:,} rounds at temperature {study.decoding_temperature:g}"
    )
    write_diagrams(folder / DIAGRAMS_PNG, study.head, study.calibrated, title)
    return study


def halves(session: Session) -> tuple[set[SampleKey], set[SampleKey]]:
    """The samples that temperatures are fitted on, and those that they are judged on: every other one.

    Raises:
        PromptError: There is only one.
    """
    keys = [sample.key for task in session.tasks for sample in task.samples]
    if len(keys) < 2:
        raise PromptError(
            "temperatures are fitted on one half of the prompts and judged on the other, and there is only one prompt: "
            "give at least two"
        )
    return set(keys[::2]), set(keys[1::2])


def _folder_name(threshold: float, plan: StudyPlan) -> str:
    return f"threshold-{threshold:g}" + ("-calibrated" if plan.calibrated_sweep else "")


def _with_threshold(
    session: Session, threshold: float, temperatures: Sequence[float] | None, keys: set[SampleKey]
) -> Session:
    """The session with a threshold, over some of its samples."""
    settings = session.settings.model_copy(
        update={
            "confidence_threshold": threshold,
            "confidence_temperatures": None if temperatures is None else tuple(temperatures),
        }
    )
    tasks = []
    for task in session.tasks:
        if chosen := tuple(sample for sample in task.samples if sample.key in keys):
            tasks.append(task.model_copy(update={"samples": chosen}))
    identity = session.identity | settings.model_dump(mode="json", exclude=HOW)
    return session.model_copy(update={"settings": settings, "identity": identity, "tasks": tuple(tasks)})


def _decode(session: Session, folder: Path, decoder: Decoder, watcher: Watcher, what: str) -> list[SampleRecord]:
    def begin(log: RecordLog, num_left: int) -> None:
        watcher.begin(what, len(log.samples), len(log.samples) + num_left)

    def on_record(record: SampleRecord | PlainRecord) -> None:
        watcher.advance()

    def start() -> AbstractContextManager[Decode]:
        return nullcontext(decoder.decoding(session.settings))

    size = BATCHES_A_PIECE * session.settings.batch_size
    run(session, folder, start, piece_size=size, begin=begin, on_record=on_record)
    keys = {sample.key for task in session.tasks for sample in task.samples}
    found = [record for record in read_records(folder / RECORDS_FILE) if isinstance(record, SampleRecord)]
    return sorted((record for record in found if record.key in keys), key=lambda record: record.key)


def _rounds(records: Sequence[SampleRecord], keys: set[SampleKey], purpose: str) -> Rounds:
    chosen = [record for record in records if record.key in keys]
    try:
        return Rounds.of_samples(chosen)
    except ValueError as error:
        raise PromptError(
            f"nothing to {purpose}, in {len(chosen)} of {len(records)} samples: {error}. Give more prompts"
        ) from error


def _measure(
    concurrencies: Sequence[int], records: Sequence[SampleRecord], decoder: Decoder, watcher: Watcher
) -> list[StepTimes]:
    """Steps with the context that they have on average: the prompt and half of what was generated."""
    context = sum(record.num_prompt_tokens + record.num_new_tokens / 2 for record in records) / len(records)
    tokens_a_round = metrics.accepted_length([record.accepted_lengths for record in records])
    measured: list[StepTimes] = []
    for num_requests in concurrencies:
        watcher.begin(f"steps of {num_requests} requests", len(measured), len(concurrencies))
        measured.append(decoder.step_times(num_requests, max(1, round(context)), max(1, round(tokens_a_round))))
        watcher.advance()
    return measured
