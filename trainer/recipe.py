"""The recipe: one typed tree of settings for a run. Defaults < YAML file < `section.key=value`.

Nothing is read from the environment. The resolved recipe is saved with the run, so that a run can be read back from
its output directory alone.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Self, TypeGuard, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from drafters.config import DrafterConfig, settings_of
from evaluation.config import EvaluationConfig
from services.errors import RecipeError
from services.placement import PlacementConfig
from services.prompts.config import PromptsConfig
from services.replay.config import MAX_CAPACITY_BYTES, Bytes, ReplayConfig
from services.replay.selectors import SelectorKind
from services.target.config import TargetConfig
from trainer.batch_layout import BatchLayout
from trainer.recipe_text import LONGEST_KEY, LONGEST_SHOWN, MAX_TEXT_BYTES, TextError, brief, one_line, parse_yaml

PATH_KEYS = (("target", "model"), ("prompts", "source"), ("prompts", "heldout"))
"""Settings that may name a file beside the recipe: a value that begins with `./` is meant relative to its folder."""

FEWEST_PREFETCH_BYTES = 1024
"""No micro-batch has fewer: a smaller `trainer.prefetch` was meant as a number of micro-batches."""

MAX_PROBLEMS = 20
"""Of a recipe that one error names: whoever reads more has the wrong file."""


class TrainerConfig(PlacementConfig):
    """The recipe's `trainer` section: the DeepSpeed side of a run. Resources and labels are those of each rank."""

    world_size: int = Field(1, ge=1, description="trainer ranks")
    threads: int | None = Field(None, ge=1, description="torch threads of each rank; None leaves torch's choice")
    precision: Literal["fp32", "bf16"] = Field("bf16", description="bf16 trains with fp32 master weights")
    zero_stage: Literal[0, 1, 2, 3] = Field(0, description="DeepSpeed ZeRO stage; bf16 uses at least 1")
    global_batch_size: int = Field(512, ge=1, description="sequences of one optimizer step, over all ranks")
    micro_batch_size: int = Field(
        1, ge=1, description="most sequences of one forward pass of one rank; fewer where ranks share a step evenly so"
    )
    learning_rate: float = Field(6e-4, gt=0, description="peak of the cosine schedule")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's decoupled weight decay")
    warmup_fraction: float = Field(0.04, ge=0, lt=1, description="part of the steps with linear warm-up")
    gradient_clip: float = Field(1.0, gt=0, description="largest global norm of the gradient")
    max_steps: int | None = Field(
        None, ge=1, description="stop after this many optimizer steps; null runs the plan out"
    )
    checkpoint_every: int = Field(500, ge=1, description="optimizer steps between checkpoints")
    keep_checkpoints: int = Field(3, ge=1, description="newest checkpoints to keep; step_0 is always kept")
    prefetch: Bytes | None = Field(
        None,
        gt=0,
        le=MAX_CAPACITY_BYTES,
        description="most bytes of features that a rank makes ready ahead of its step ('256MiB'), as the drafter reads "
        "them; one micro-batch always is. null: room for two of the longest",
    )
    wait_s: float = Field(600.0, gt=0, description="longest wait for a micro-batch before the run fails")
    silent_s: float = Field(
        180.0, ge=5, description="a rank that gives no sign of life for so long is killed, and all begin again"
    )
    tail: Literal["pad", "drop"] = Field("pad", description="a last step without a full batch is padded or dropped")
    deterministic: bool = Field(
        False, description="plan order, one sample a forward pass: the same losses for any number of targets and ranks"
    )
    seed: int = Field(42, description="seeds the drafter's new weights")

    @property
    def layout(self) -> BatchLayout:
        """How a step is cut into forward passes."""
        return BatchLayout.of(
            global_batch_size=self.global_batch_size,
            world_size=self.world_size,
            micro_batch_size=self.micro_batch_size,
            deterministic=self.deterministic,
        )

    @field_validator("prefetch")
    @classmethod
    def _prefetch_is_in_bytes(cls, prefetch: int | None) -> int | None:
        if prefetch is not None and prefetch < FEWEST_PREFETCH_BYTES:
            raise ValueError(
                f"{prefetch} bytes hold no micro-batch: prefetch is in bytes, not in micro-batches. Leave it out for "
                f"room for two of the longest, or give at least {FEWEST_PREFETCH_BYTES}, such as 256MiB"
            )
        return prefetch

    @model_validator(mode="after")
    def _batch_divides(self) -> Self:
        if self.global_batch_size % self.world_size:
            raise ValueError(
                f"global_batch_size {self.global_batch_size} is not a multiple of world_size {self.world_size}, and "
                "every rank trains the same number of sequences; change one of the two"
            )
        return self


class Recipe(BaseModel):
    """One run."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", description="the run's name")
    output_dir: Path = Field(Path("runs/run"), description="checkpoints, ledger and telemetry of the run")
    target: TargetConfig
    drafter: DrafterConfig = DrafterConfig()
    prompts: PromptsConfig
    replay: ReplayConfig = ReplayConfig()
    trainer: TrainerConfig = TrainerConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    @model_validator(mode="after")
    def _deterministic_can_be(self) -> Self:
        if not self.trainer.deterministic:
            return self
        if self.replay.reuse > 1:
            raise ValueError(
                f"trainer.deterministic needs replay.reuse: 1, not {self.replay.reuse}: which rank gets a sample's "
                "next use depends on who asks first. Set replay.reuse to 1, or trainer.deterministic to false"
            )
        replay = self.replay
        if replay.selector != SelectorKind.FIFO or replay.error_buffer is not None or replay.min_size > 1:
            raise ValueError(
                "trainer.deterministic names the samples of each step in plan order, so nothing is left to choose or "
                f"to wait for: leave out replay.selector ({replay.selector.value}), replay.min_size "
                f"({replay.min_size}) and replay.error_buffer ({replay.error_buffer}), or set trainer.deterministic to "
                "false"
            )
        if self.prompts.answers == "target":
            raise ValueError(
                "trainer.deterministic needs prompts.answers: dataset: an answer of the target's that is too short to "
                "learn from is known only after its step was granted. Set one of the two"
            )
        if self.target.max_batch_samples > 1:
            raise ValueError(
                f"trainer.deterministic needs target.max_batch_samples: 1, not {self.target.max_batch_samples}: what a "
                "sample shares its forward pass with changes its last bits. Set target.max_batch_samples to 1, or "
                "trainer.deterministic to false"
            )
        return self

    @model_validator(mode="after")
    def _rate_limiter_gives_micro_batches(self) -> Self:
        largest = self.replay.rate_limiter.largest_lease
        if self.trainer.micro_batch_size > largest:
            raise ValueError(
                f"trainer.micro_batch_size {self.trainer.micro_batch_size} is more than the {largest:g} uses that "
                f"replay.error_buffer {self.replay.error_buffer} and replay.min_size {self.replay.min_size} always let "
                "go at once: training would wait for samples, and capturing for training. Raise replay.error_buffer "
                "or replay.min_size, or lower trainer.micro_batch_size"
            )
        return self

    @model_validator(mode="after")
    def _longest_prompt_fits_a_forward_pass(self) -> Self:
        if self.prompts.max_length > self.target.max_batch_tokens:
            raise ValueError(
                f"prompts.max_length {self.prompts.max_length} is above target.max_batch_tokens "
                f"{self.target.max_batch_tokens}, so the target would refuse such prompts: lower the one or raise the "
                "other"
            )
        return self

    @model_validator(mode="after")
    def _evaluator_and_target_fit_one_gpu(self) -> Self:
        shared, targets = self.evaluation.num_gpus, self.target.num_gpus
        if self.evaluation.placement == "share_target" and shared and targets and shared + targets > 1:
            raise ValueError(
                f"evaluation.placement share_target puts the evaluator, with evaluation.num_gpus {shared:g}, on the "
                f"target's GPU, of which target.num_gpus {targets:g} leaves {max(0.0, 1 - targets):g}: lower one of "
                "the two, or set evaluation.placement to gpu or off"
            )
        return self

    def identity(self) -> dict[str, Any]:
        """The settings that a resumed run must share with the run it resumes: what is trained on what."""
        return {
            "target": self.target.model,
            "drafter": self.drafter.model_dump(mode="json", exclude={"loss"}),
            "prompts": self.prompts.model_dump(mode="json", exclude={"heldout", "strict"}),
            "reuse": self.replay.reuse,
            "global_batch_size": self.trainer.global_batch_size,
            "seed": self.trainer.seed,
        }


def load_recipe(path: Path, overrides: Iterable[str] = (), options: Mapping[str, Any] | None = None) -> Recipe:
    """Read a recipe file, then apply `options`, then `section.key=value` overrides.

    Relative paths are relative to the working directory; in the file, `target.model`, `prompts.source` and
    `prompts.heldout` that begin with `./` are relative to the recipe's folder.

    Whoever changes `drafter.algorithm` keeps those of the file's drafter settings that the other algorithm has, too.

    Args:
        path: The YAML file.
        overrides: Texts whose values are read as YAML.
        options: Values by `section.key`, taken as they are: a folder named 123 is no number.

    Raises:
        RecipeError: The file is missing or no YAML, a key is unknown (the message names the nearest one), or a value
            does not fit.
    """
    tree = _read(path)
    changes = [*(options or {}).items(), *map(_parse, overrides)]
    _change_algorithm(tree, dict(changes).get("drafter.algorithm"))
    for key, value in changes:
        _set(tree, key, value)
    return build_recipe(tree, str(path))


def build_recipe(tree: Mapping[str, Any], origin: str) -> Recipe:
    """Validate a tree of plain values; `origin` is named in errors.

    Raises:
        RecipeError: A key is unknown, missing, or has a value that does not fit; one line for each.
    """
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        items = error.errors()
        lines = [_explain(item) for item in items[:MAX_PROBLEMS]]
        if len(items) > MAX_PROBLEMS:
            lines.append(f"  and {len(items) - MAX_PROBLEMS} more")
        raise RecipeError(f"{origin}:\n" + "\n".join(lines)) from error


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_TEXT_BYTES + 1)
        if len(content) > MAX_TEXT_BYTES:
            raise RecipeError(f"{path} has more than {MAX_TEXT_BYTES // 1024} KiB: that is no recipe")
        tree = parse_yaml(content.decode("utf-8"))
    except OSError as error:
        near = difflib.get_close_matches(path.name, [file.name for file in path.parent.glob("*.yaml")], n=1)
        hint = f"; did you mean {path.with_name(near[0])}?" if near else ""
        raise RecipeError(f"cannot read recipe {path}: {error.strerror}{hint}") from error
    except (UnicodeDecodeError, TextError) as error:
        raise RecipeError(f"recipe {path} is not YAML: {error}") from error
    if not isinstance(tree, dict):
        found = "empty" if tree is None else f"a {type(tree).__name__}"
        raise RecipeError(f"recipe {path} must be a mapping of sections (target, prompts, ...), and is {found}")
    sections = known_sections()
    # A section whose lines are all commented out is an empty section.
    tree = {key: {} if value is None and key in sections else value for key, value in tree.items()}
    for section, key in PATH_KEYS:
        values = tree.get(section)
        if isinstance(values, dict) and isinstance(value := values.get(key), str) and value.startswith("./"):
            values[key] = str(path.parent.resolve() / value)
    return tree


def _change_algorithm(tree: dict[str, Any], algorithm: Any) -> None:
    """Make the file's drafter section one of another algorithm."""
    section = tree.get("drafter", {})
    if isinstance(algorithm, str) and isinstance(section, dict) and algorithm != section.get("algorithm", "dspark"):
        tree["drafter"] = settings_of(algorithm, section)


def _parse(override: str) -> tuple[str, Any]:
    """Key and value of `section.key=value`."""
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise RecipeError(f"override {_shown_override(key, override)} must look like section.key=value")
    try:
        return key, parse_yaml(text)
    except TextError as error:
        raise RecipeError(f"override {_shown_override(key, override)}: the value is not YAML: {error}") from None


def _set(tree: dict[str, Any], key: str, value: Any) -> None:
    *sections, leaf = key.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise RecipeError(f"override of {_shown_key(key)}: {_shown_key(section)} is a value, not a section")
    tree[leaf] = value


def _explain(item: Any) -> str:
    """One pydantic error as a line: key, what is wrong, and the nearest known key for an unknown one."""
    parts = [str(part) for part in item["loc"]]
    key = _shown_key(".".join(parts))
    if item["type"] == "extra_forbidden":
        return f"  {key}: unknown key; {_hint('.'.join(part[:LONGEST_KEY] for part in parts))}"
    value = brief(item["input"])
    if item["type"] == "model_type" and key:
        return f"  {key}: must be a section of settings (given {value})"
    given = "" if item["type"] == "missing" or isinstance(item["input"], dict) else f" (given {value})"
    return f"  {key or 'recipe'}: {one_line(item['msg'].removeprefix('Value error, '))}{given}"


def _shown_override(key: str, override: str) -> str:
    if len(override) <= LONGEST_SHOWN:
        return brief(override)
    return f"of {_shown_key(key)}, {len(override)} characters,"


def _shown_key(key: str) -> str:
    return one_line(key, LONGEST_KEY)


def _hint(key: str) -> str:
    """What an unknown key was probably meant to be: its name in another section, a similar one in its own, any."""
    known = known_keys()
    section, _, name = key.rpartition(".")
    siblings = [other.rpartition(".")[2] for other in known if other.rpartition(".")[0] == section]
    elsewhere = [other for other in known if other.rpartition(".")[2] == name]
    if elsewhere:
        return f"did you mean {' or '.join(elsewhere)}?"
    if similar := difflib.get_close_matches(name, siblings, n=1, cutoff=0.5):
        return f"did you mean {f'{section}.' if section else ''}{similar[0]}?"
    if similar := difflib.get_close_matches(name, [other.rpartition(".")[2] for other in known], n=1):
        return f"did you mean {next(other for other in known if other.rpartition('.')[2] == similar[0])}?"
    return f"known here: {', '.join(siblings)}"


def known_sections() -> list[str]:
    """The sections of a recipe."""
    return [name for name, field in Recipe.model_fields.items() if _is_section(field.annotation)]


def known_keys() -> list[str]:
    """Every key a recipe can have, as `section` or `section.key`."""
    return list(_walk(Recipe, ""))


def _walk(model: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield prefix + name
        for annotation in get_args(field.annotation) or (field.annotation,):  # `Section | None` is one, too
            if _is_section(annotation):
                yield from _walk(annotation, f"{prefix}{name}.")


def _is_section(annotation: Any) -> TypeGuard[type[BaseModel]]:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)
