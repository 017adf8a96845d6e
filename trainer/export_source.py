"""What is exported: a checkpoint, and what the run that wrote it says of it. No torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict

from evaluation.weights import weights_digest
from services.errors import CheckpointError, TargetError, UsageError
from services.models import ModelShape, find_model, read_shape
from services.prompts.chat import ChatEncoder
from services.prompts.sources import Message
from services.reading import read_json
from trainer.recipe import Recipe, load_recipe

CONFIG, RECIPE, PROVENANCE, RUN = "config.json", "recipe.yaml", "provenance.json", "run.json"
EVALUATIONS, ANSWERS = "evaluations.jsonl", "answers.jsonl"
UNTRAINED = "step_0"
PROBE: list[Message] = [{"role": "user", "content": "?"}]


class MeasuredDomain(BaseModel):
    """What a model card shows of the prompts of one domain; None where no round was decoded."""

    model_config = ConfigDict(frozen=True)

    num_samples: int
    accepted_length: float | None
    interval: tuple[float, float] | None
    accept_rate: tuple[float, ...] = ()


class Measured(BaseModel):
    """What a model card shows of one decoding; whatever else a report has is passed over."""

    model_config = ConfigDict(frozen=True)

    label: str
    accepted_length: float
    interval: tuple[float, float]
    accept_rate: tuple[float, ...] = ()
    temperature: float
    num_samples: int
    domains: dict[str, MeasuredDomain] = {}
    weights: str = ""
    began_s: float = 0.0


class _Entry(BaseModel):
    """A line of the run's results."""

    settings: dict[str, Any]
    report: Measured


class ExportSource(NamedTuple):
    """A checkpoint's folder and what lies beside it; a drafter from elsewhere has neither recipe nor run."""

    checkpoint: Path
    run: Path | None
    recipe: Recipe | None
    target_name: str | None
    """As the user's own recipe has it."""
    provenance: dict[str, Any]
    measured: tuple[Measured, ...]
    """Its own figures, and those of the untrained drafter before them; none where it has not been measured."""

    @property
    def name(self) -> str:
        """What the checkpoint is called."""
        return self.checkpoint.name


class SourceTarget(NamedTuple):
    """The target of an export."""

    name: str
    folder: Path
    shape: ModelShape
    architectures: tuple[str, ...]

    @property
    def is_folder(self) -> bool:
        """Whether it is named by where it lies, not by what the hub calls it."""
        return Path(self.name).expanduser().is_dir()

    @property
    def public_name(self) -> str:
        """A hub name as it is, a folder by its last part."""
        return self.folder.resolve().name if self.is_folder else self.name


def find_source(folder: Path) -> ExportSource:
    """Look at a checkpoint's folder, or at a link to one.

    Raises:
        UsageError: It is no checkpoint.
        CheckpointError: What lies beside it cannot be read.
    """
    checkpoint = folder.expanduser().resolve()
    if not (checkpoint / CONFIG).is_file():
        if (checkpoint / RUN).is_file():
            steps = sorted(path.name for path in checkpoint.glob("step_*"))
            raise UsageError(
                f"{folder} is a run's directory: name one of its checkpoints, such as {folder / 'step_best'} "
                f"(there are: {', '.join(steps) or 'none'})"
            )
        raise UsageError(f"{folder} is no checkpoint: it has no {CONFIG}")
    run = checkpoint.parent if (checkpoint.parent / RUN).is_file() else None
    recipe = load_recipe(checkpoint / RECIPE) if (checkpoint / RECIPE).is_file() else None
    users = load_recipe(run / RECIPE) if run and (run / RECIPE).is_file() else recipe
    return ExportSource(
        checkpoint=checkpoint,
        run=run,
        recipe=recipe,
        target_name=users.target.model if users else None,
        provenance=_read_provenance(checkpoint / PROVENANCE),
        measured=_read_measured(run, checkpoint) if run else (),
    )


def find_target(source: ExportSource, given: str | None) -> SourceTarget | None:
    """The target that a drafter is for; None where nobody says.

    Args:
        source: Whose recipe names one.
        given: What the user says instead.

    Raises:
        TargetError: It is not there.
    """
    name = given or source.target_name
    if name is None:
        return None
    try:
        folder = find_model(name, weights=False)
    except TargetError as error:
        raise TargetError(f"{error} Or say where it is: --target FOLDER") from error
    values = json.loads((folder / CONFIG).read_text(encoding="utf-8")) if (folder / CONFIG).exists() else {}
    return SourceTarget(name, folder, read_shape(folder), tuple(values.get("architectures") or ()))


def has_thinking_modes(target: SourceTarget) -> bool:
    """Whether the chat template renders a prompt otherwise when thinking is on.

    Raises:
        PromptError: The template cannot be read.
    """
    if not (target.folder / "tokenizer.json").exists():
        return False
    on, off = (
        ChatEncoder(target.folder, system_prompt=None, enable_thinking=thinking).render(
            PROBE, add_generation_prompt=True
        )
        for thinking in (True, False)
    )
    return on != off


def _read_provenance(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        values = read_json(path.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"cannot read {path}: {error}; remove it to export without it") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds no JSON object; remove it to export without it")
    return values


def _read_measured(run: Path, checkpoint: Path) -> tuple[Measured, ...]:
    """Figures of the untrained drafter and of the checkpoint, both as they are now and with the same settings.

    Of several settings these are the ones that the checkpoint was last measured with.
    """
    entries = _read_entries(run / EVALUATIONS)
    own = _entries_of(checkpoint, entries)
    if not own:
        return ()
    settings = own[-1].settings
    untrained = run / UNTRAINED
    folders = [checkpoint] if checkpoint == untrained else [untrained, checkpoint]
    measured = (_on_most_prompts(_entries_of(folder, entries), settings) for folder in folders)
    return tuple(report for report in measured if report is not None)


def _read_entries(path: Path) -> list[_Entry]:
    """The results in the order in which they were measured; lines of other versions are passed over."""
    entries: list[_Entry] = []
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            entries.append(_Entry.model_validate(read_json(line)))
        except ValueError:
            continue  # the run itself refuses such a line; here it is a figure less
    return sorted(entries, key=lambda entry: entry.report.began_s)


def _entries_of(checkpoint: Path, entries: Sequence[_Entry]) -> list[_Entry]:
    """The results of what a folder holds now; a run that began anew may have had another drafter there."""
    try:
        measured = (checkpoint.name, weights_digest(checkpoint))
    except FileNotFoundError:
        return []
    return [entry for entry in entries if (entry.report.label, entry.report.weights) == measured]


def _on_most_prompts(entries: Sequence[_Entry], settings: dict[str, Any]) -> Measured | None:
    """The result of these settings that has most prompts: there are fewer during training than at its ends."""
    reports = [entry.report for entry in entries if entry.settings == settings]
    return max(reports, key=lambda report: report.num_samples, default=None)
