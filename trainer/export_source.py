"""What is exported: a checkpoint, and what the run that wrote it says of it. No torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError

from services.errors import CheckpointError, TargetError, UsageError
from services.models import ModelShape, find_model, read_shape
from services.prompts.chat import ChatEncoder
from services.prompts.sources import Message
from services.reading import read_json
from trainer.recipe import Recipe, load_recipe

CONFIG, RECIPE, PROVENANCE, RUN = "config.json", "recipe.yaml", "provenance.json", "run.json"
EVALUATIONS, ANSWERS = "evaluations.jsonl", "answers.jsonl"
PROBE: list[Message] = [{"role": "user", "content": "?"}]


class Measured(BaseModel):
    """What a model card shows of one decoding; whatever else a report has is passed over."""

    model_config = ConfigDict(frozen=True)

    label: str
    accepted_length: float
    interval: tuple[float, float]
    accept_rate: tuple[float, ...] = ()
    temperature: float
    num_samples: int


class ExportSource(NamedTuple):
    """A checkpoint's folder and what lies beside it; a drafter from elsewhere has neither recipe nor run."""

    checkpoint: Path
    run: Path | None
    recipe: Recipe | None
    target_name: str | None
    """As the user's own recipe has it."""
    provenance: dict[str, Any]
    measured: tuple[Measured, ...]
    """Its own figures, and those of the untrained drafter before them."""

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
        measured=_read_measured(run / EVALUATIONS, checkpoint.name) if run else (),
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


def _read_measured(path: Path, label: str) -> tuple[Measured, ...]:
    """Figures of the untrained drafter and of the checkpoint; lines of other versions are passed over."""
    found: list[Measured] = []
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            entry = read_json(line)
            report = Measured.model_validate(entry["report"] if isinstance(entry, dict) else entry)
        except (ValueError, KeyError, ValidationError):
            continue  # the run itself refuses such a line; here it is a figure less
        if report.label in ("step_0", label):
            found.append(report)
    return tuple(sorted(found, key=lambda report: report.label != "step_0"))
