"""The recipe: one typed tree of settings for a run. Defaults < YAML file < `section.key=value`.

Nothing is read from the environment. The resolved recipe is saved with the run, so that a run can be read back from
its output directory alone.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Self, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from drafters.config import DrafterConfig
from evaluation.config import EvaluationConfig
from services.errors import RecipeError
from services.prompts.config import PromptsConfig
from services.replay.config import ReplayConfig
from services.target.config import TargetConfig


class TrainerConfig(BaseModel):
    """The recipe's `trainer` section: the DeepSpeed side of a run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    world_size: int = Field(1, ge=1, description="trainer ranks")
    num_gpus: float = Field(1.0, ge=0, description="GPUs of each rank; 0 trains on the CPU with gloo")
    num_cpus: float = Field(0.0, ge=0, description="CPUs that Ray reserves for each rank")
    threads: int | None = Field(None, ge=1, description="torch threads of each rank; None leaves torch's choice")
    precision: Literal["fp32", "bf16"] = Field("bf16", description="bf16 trains with fp32 master weights")
    zero_stage: Literal[0, 1, 2, 3] = Field(0, description="DeepSpeed ZeRO stage")
    global_batch_size: int = Field(512, ge=1, description="sequences of one optimizer step, over all ranks")
    micro_batch_size: int = Field(1, ge=1, description="sequences of one forward pass of one rank")
    learning_rate: float = Field(6e-4, gt=0, description="peak of the cosine schedule")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's decoupled weight decay")
    warmup_fraction: float = Field(0.04, ge=0, lt=1, description="part of the steps with linear warm-up")
    gradient_clip: float = Field(1.0, gt=0, description="largest global norm of the gradient")
    max_steps: int | None = Field(
        None, ge=1, description="stop after this many optimizer steps; null runs the plan out"
    )
    checkpoint_every: int = Field(500, ge=1, description="optimizer steps between checkpoints")
    keep_checkpoints: int = Field(3, ge=1, description="newest checkpoints to keep; step_0 is always kept")
    prefetch: int = Field(2, ge=1, description="micro-batches fetched ahead of the step")
    tail: Literal["pad", "drop"] = Field("pad", description="a last step without a full batch is padded or dropped")
    deterministic: bool = Field(False, description="plan order: the same losses for any number of targets")
    seed: int = Field(42, description="seeds the drafter's new weights")

    @property
    def accumulation(self) -> int:
        """Micro-batches of one rank in one optimizer step."""
        return self.global_batch_size // (self.world_size * self.micro_batch_size)

    @model_validator(mode="after")
    def _batch_divides(self) -> Self:
        unit = self.world_size * self.micro_batch_size
        if self.global_batch_size % unit:
            raise ValueError(
                f"global_batch_size {self.global_batch_size} is not a multiple of world_size × micro_batch_size = {unit}"
            )
        return self


class Recipe(BaseModel):
    """One run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", description="the run's name")
    output_dir: Path = Field(Path("runs/run"), description="checkpoints, ledger and telemetry of the run")
    target: TargetConfig
    drafter: DrafterConfig = DrafterConfig()
    prompts: PromptsConfig
    replay: ReplayConfig = ReplayConfig()
    trainer: TrainerConfig = TrainerConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    def identity(self) -> dict[str, Any]:
        """The settings that a resumed run must share with the run it resumes: what is trained on what."""
        return {
            "target": self.target.model,
            "drafter": self.drafter.model_dump(mode="json"),
            "prompts": self.prompts.model_dump(mode="json", exclude={"heldout", "strict"}),
            "reuse": self.replay.reuse,
            "global_batch_size": self.trainer.global_batch_size,
            "seed": self.trainer.seed,
        }


def load_recipe(path: Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe file and apply `section.key=value` overrides.

    Relative paths in a recipe are relative to the working directory, those that begin with `./` to the recipe's folder.

    Raises:
        RecipeError: The file is missing or no YAML, a key is unknown (the message names the nearest one), or a value
            does not fit.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"cannot read recipe {path}: {error.strerror}") from error
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"recipe {path} is not YAML: {error}") from error
    if not isinstance(tree, dict):
        raise RecipeError(f"recipe {path} must be a mapping of sections, not {type(tree).__name__}")
    for override in overrides:
        _apply(tree, override)
    return build_recipe(tree, str(path))


def build_recipe(tree: Mapping[str, Any], origin: str) -> Recipe:
    """Validate a tree of plain values; `origin` is named in errors."""
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise RecipeError(f"{origin}:\n" + "\n".join(_explain(item) for item in error.errors())) from error


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"override {override!r} must look like section.key=value")
    *sections, leaf = key.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise RecipeError(f"override {override!r}: {section} is a value, not a section")
    try:
        tree[leaf] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise RecipeError(f"override {override!r}: value is not YAML: {error}") from error


def _explain(item: Any) -> str:
    """One pydantic error as a line: key, what is wrong, and the nearest known key for an unknown one."""
    location = [str(part) for part in item["loc"]]
    key = ".".join(location)
    if item["type"] != "extra_forbidden":
        given = "" if item["type"] == "missing" or isinstance(item["input"], dict) else f" (given {item['input']!r})"
        return f"  {key or 'recipe'}: {item['msg'].removeprefix('Value error, ')}{given}"
    known = known_keys()
    section = ".".join(location[:-1])
    siblings = [name for name in known if name.rpartition(".")[0] == section]
    nearest = difflib.get_close_matches(key, siblings, n=1, cutoff=0.5) or difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean {nearest[0]}?" if nearest else f"known here: {', '.join(siblings)}"
    return f"  {key}: unknown key; {hint}"


def known_keys() -> list[str]:
    """Every key a recipe can have, as `section` or `section.key`."""
    return [".".join(path) for path, _ in _walk(Recipe, ())]


def _walk(model: type[BaseModel], prefix: tuple[str, ...]) -> Iterable[tuple[tuple[str, ...], Any]]:
    for name, field in model.model_fields.items():
        yield (*prefix, name), field
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from _walk(kind, (*prefix, name))
