"""One evaluation of a drafter from its settings to its figures: planned, decoded (or gone on with), summed up.

What decodes is handed in: this process, or replicas on a Ray cluster. No torch until something is decoded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

from drafters.registry import algorithm_of_architecture
from evaluation.benchmark import BenchmarkSettings, PlannedTask, PromptFile, plan_task
from evaluation.origin import Origin, check_origin, is_other_target
from evaluation.published import published_row, published_target
from evaluation.records import SETTINGS_FILE, PlainRecord, RecordLog, SampleRecord
from evaluation.results import Results, collect_results
from evaluation.task_sources import cache_folder, fetch, find_in_folder, task_file
from evaluation.tasks import DOMAINS, PUBLISHED_TASKS, TASKS, Task, find_task
from evaluation.weights import weights_digest
from evaluation.work import Work, remaining
from services.contracts import Record
from services.errors import CheckpointError, UsageError
from services.models import ModelShape, find_model, read_shape
from services.prompts.chat import ChatEncoder
from services.reading import read_json

GREEDY_BELOW = 1e-5
"""As `drafters.drafter.GREEDY_BELOW`, which torch comes with."""

HOW = {"threads"}
"""Settings that change only how long decoding takes."""

OnRecord = Callable[[SampleRecord | PlainRecord], None]

Decode = Callable[[Sequence[Work], OnRecord], None]
"""Does pieces of work, and hands over each record as soon as it has it."""

StartDecoding = Callable[[], AbstractContextManager[Decode]]


class TaskChoice(Record):
    """Which prompts are decoded.

    Attributes:
        names: Tasks; None: all published ones, or those that `folder` has, unless there are `prompts`.
        folder: Holds one JSONL file a task; None downloads them.
        prompts: JSONL files of the user's own, each a task.
        max_samples: Fewer of each than the published protocol takes.
    """

    names: tuple[str, ...] | None = None
    folder: Path | None = None
    prompts: tuple[Path, ...] = ()
    max_samples: int | None = None


class Session(Record):
    """An evaluation that is ready to be decoded.

    Attributes:
        settings: How samples are decoded.
        tasks: The samples.
        identity: What determines the records, as JSON values.
        algorithm: Of the drafter.
        warnings: What whoever reads the figures must know.
        published: τ by task, where it was published for this target and kind of drafter.
    """

    settings: BenchmarkSettings
    tasks: tuple[PlannedTask, ...]
    identity: dict[str, Any]
    algorithm: str
    warnings: tuple[str, ...]
    published: dict[str, float]

    @property
    def digest(self) -> str:
        """A short name of the identity."""
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:8]

    @property
    def is_greedy(self) -> bool:
        """Whether both sides' outputs are the same tokens."""
        return self.settings.temperature < GREEDY_BELOW

    def default_folder(self) -> Path:
        """Where an evaluation goes that was given no place: the same command finds it again."""
        drafter = Path(self.settings.drafter)
        return Path("slipstream-eval") / f"{drafter.parent.name}-{drafter.name}-{self.digest}".lstrip("-")


def prepare(settings: BenchmarkSettings, choice: TaskChoice, say: Callable[[str], None]) -> Session:
    """Check drafter and target against each other, and plan the samples.

    Raises:
        UsageError: A task is unknown or not in the folder.
        PromptError: A task's prompts are missing, malformed, empty or all too long.
        CheckpointError: The drafter is missing or another target's.
        TargetError: The target is missing.
    """
    sources = _choose_tasks(choice)
    target_folder = find_model(settings.target, weights=False)
    shape = read_shape(target_folder)
    drafter = Path(settings.drafter).expanduser().resolve()
    origin = check_origin(drafter, target_folder, allow_other_target=settings.allow_other_target)
    is_folder = Path(settings.target).expanduser().is_dir()
    target = str(target_folder.resolve()) if is_folder else settings.target  # replicas run elsewhere
    settings = settings.model_copy(update={"drafter": str(drafter), "target": target})
    encoder = ChatEncoder(target_folder, system_prompt=None, enable_thinking=settings.enable_thinking)
    tasks = [
        plan_task(
            task,
            task.path if isinstance(task, PromptFile) else _file_of(task, choice.folder, say),
            encoder,
            seed=settings.seed,
            max_samples=choice.max_samples,
            max_tokens=shape.max_tokens,
        )
        for task in sources
    ]
    tasks.sort(key=lambda task: DOMAINS.index(task.domain))
    algorithm = _algorithm(drafter)
    published = published_row(settings.target, algorithm)
    identity = settings.model_dump(mode="json", exclude=None if settings.measure_speedup else HOW) | {
        "target_fingerprint": shape.fingerprint,
        "drafter_digest": _digest(drafter),
        "tasks": [task.name for task in tasks],
        "max_samples": choice.max_samples,
    }
    warnings = _warnings(settings, tasks, shape, is_other_target(origin, target_folder), origin, bool(published))
    return Session(
        settings=settings,
        tasks=tuple(tasks),
        identity=identity,
        algorithm=algorithm,
        warnings=tuple(warnings),
        published=published,
    )


def run(
    session: Session,
    folder: Path,
    start: StartDecoding,
    *,
    piece_size: int,
    begin: Callable[[RecordLog, int], None],
    on_record: OnRecord,
) -> Results:
    """Decode what a folder lacks of an evaluation, and sum it all up.

    Args:
        session: From `prepare`.
        folder: Where records go; those that are there are not made again.
        start: Starts what decodes; not called where nothing is left to do.
        piece_size: Samples that are handed over at a time.
        begin: Hears what is there already, and how many records are to come.
        on_record: Hears of each new record.

    Raises:
        OutputDirError: The folder holds another evaluation or other things.
        SlipstreamError: Target or drafter cannot be loaded, or decoding failed.
    """
    with ExitStack() as stack:
        decode: Decode | None = None
        if not (folder / SETTINGS_FILE).exists():
            decode = stack.enter_context(start())  # what cannot even be loaded shall leave no folder behind
        log = stack.enter_context(RecordLog(folder, session.identity))
        left = remaining(session.tasks, log, measure_speedup=session.settings.measure_speedup, piece_size=piece_size)
        begin(log, sum(work.num_records for work in left))

        def keep(record: SampleRecord | PlainRecord) -> None:
            log.add(record)
            on_record(record)

        if left:
            decode = decode or stack.enter_context(start())
            decode(left, keep)
        return collect_results(
            session.tasks,
            log.samples,
            log.plain,
            seed=session.settings.seed,
            greedy=session.is_greedy,
            published=session.published,
        )


def closing_warnings(session: Session, results: Results) -> list[str]:
    """The session's warnings, and those that only its figures give."""
    warnings = list(session.warnings)
    if results.overall.differing:
        warnings.append(
            f"greedy output differs from the target's own in {results.overall.differing} of {results.overall.samples} "
            f"samples: {_why_different(session.settings.dtype, results)}"
        )
    return warnings


def _why_different(dtype: str, results: Results) -> str:
    """Whether rounding explains the divergences, and the first that it does not explain, or the first of all."""
    divergences = results.overall.divergences
    beyond = [found for found in divergences if not found.within_rounding]
    if not divergences:
        return "decoding is not lossless" if dtype == "float32" else f"rounding in {dtype} may do that, float32 tells"
    cause = f"{len(beyond)} beyond what rounding in {dtype} explains" if beyond else f"rounding in {dtype} does that"
    shown = (beyond or divergences)[0]
    (name, *_) = [name for name, figures in results.tasks.items() if shown in figures.divergences]
    return f"{cause}; sample {shown.sample} of {name} left it {shown.place}"


def _choose_tasks(choice: TaskChoice) -> list[Task | PromptFile]:
    names = choice.names
    if names is None and choice.folder is not None:
        names = tuple(name for name in TASKS if task_file(name, choice.folder).is_file())
        if not names:
            raise UsageError(
                f"{choice.folder} has the prompts of no task: name them after the tasks, {', '.join(TASKS)}, and .jsonl"
            )
    elif names is None:
        names = () if choice.prompts else PUBLISHED_TASKS
    tasks: list[Task | PromptFile] = [find_task(name) for name in dict.fromkeys(names)]
    for path in choice.prompts:
        if path.stem in TASKS or any(task.name == path.stem for task in tasks):
            raise UsageError(f"--prompts {path}: there is a task {path.stem} already; give the file another name")
        tasks.append(PromptFile(name=path.stem, path=path))
    if not tasks:
        raise UsageError(f"no task is named: give --tasks some of {', '.join(TASKS)}, or leave it out")
    return tasks


def _file_of(task: Task, folder: Path | None, say: Callable[[str], None]) -> Path:
    return fetch(task, cache_folder(), say) if folder is None else find_in_folder(task, folder)


def _algorithm(drafter: Path) -> str:
    try:
        config: Any = read_json((drafter / "config.json").read_bytes())
        has_heads = bool(config.get("markov_rank") or config.get("enable_confidence_head"))
        return algorithm_of_architecture(str(config["architectures"][0]), config["model_type"], has_heads=has_heads)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"cannot tell what drafter {drafter} holds, by its config.json: {error}") from error


def _digest(drafter: Path) -> str:
    """Of config and weights: a drafter that was trained on is another one."""
    try:
        return weights_digest(drafter)[:16]
    except OSError as error:
        raise CheckpointError(f"cannot load the drafter at {drafter}: {error}") from error


def _warnings(
    settings: BenchmarkSettings,
    tasks: Sequence[PlannedTask],
    shape: ModelShape,
    other_target: bool,
    origin: Origin,
    has_published: bool,
) -> list[str]:
    warnings = []
    if origin.enable_thinking not in (None, settings.enable_thinking):
        modes: Mapping[bool, str] = {True: "thinking", False: "non-thinking"}
        warnings.append(
            f"the drafter was trained on {modes[not settings.enable_thinking]} prompts and is measured on "
            f"{modes[settings.enable_thinking]} ones: in the mode that it was trained for it drafts better"
        )
    if other_target:
        warnings.append(f"the drafter was trained with another target, {origin.model}")
    for task in tasks:
        if task.num_skipped:
            warnings.append(
                f"{task.num_skipped} of {task.num_skipped + len(task.samples)} prompts of {task.name} are longer than "
                f"the target's context of {shape.max_tokens} tokens and were skipped"
            )
    if has_published and not settings.is_published_protocol:
        warnings.append(
            f"the published figures for {published_target(settings.target)} are of temperature 1, 2048 new tokens, "
            "non-thinking prompts and no confidence threshold: these are not"
        )
    return warnings
