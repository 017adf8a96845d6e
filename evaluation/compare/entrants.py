"""The drafters of a comparison: readable, different ones, each with its own name and the same samples. No torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from math import prod
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from evaluation.benchmark import BenchmarkSettings, PlannedTask
from evaluation.session import Session, TaskChoice, prepare
from services.contracts import Record
from services.errors import CheckpointError, UsageError

TARGETS_OWN = ("embed_tokens.weight", "lm_head.weight")
"""Tensors of a drafter that are frozen copies of the target's."""

DRAFTERS_OWN = ("drafter", "drafter_digest")
"""What of a session's identity is the drafter's; decoding by the target alone does not depend on it."""

STEP = "step_"
"""A run's checkpoints are named so."""

MOST_NAME_CHARS = 100
"""Of the drafters' names in a folder's: file systems take 255 bytes."""


class Parameters(Record):
    """How large a drafter is.

    Attributes:
        own: Parameters that were trained.
        in_all: Those and the target's embedding and head.
    """

    own: int
    in_all: int


class Entrant(Record):
    """One drafter.

    Attributes:
        label: Names it in tables and plots; no other has it.
        session: Its evaluation; all have the same samples.
        parameters: Its size.
    """

    label: str
    session: Session
    parameters: Parameters

    @property
    def folder_name(self) -> str:
        """Of its records: the same whoever it is compared with, another one once it was trained on."""
        return f"{Path(self.session.settings.drafter).name}-{self.session.identity['drafter_digest'][:8]}"


class Match(Record):
    """A comparison that is ready to be decoded.

    Attributes:
        entrants: At least two.
    """

    entrants: tuple[Entrant, ...]

    @property
    def session(self) -> Session:
        """What all have in common: tasks, and settings but for the drafter."""
        return self.entrants[0].session

    @property
    def settings(self) -> BenchmarkSettings:
        """As `session`."""
        return self.session.settings

    @property
    def tasks(self) -> tuple[PlannedTask, ...]:
        """The samples of all."""
        return self.session.tasks

    @property
    def plain_identity(self) -> dict[str, Any]:
        """What determines how the target decodes alone, as JSON values."""
        return {name: value for name, value in self.session.identity.items() if name not in DRAFTERS_OWN}

    @property
    def warnings(self) -> list[str]:
        """What whoever reads the figures must know; each drafter's own with its label."""
        return labelled({entrant.label: entrant.session.warnings for entrant in self.entrants})

    def default_folder(self) -> Path:
        """Where a comparison goes that was given no place: the same drafters and settings find it again."""
        identities = [entrant.session.identity for entrant in self.entrants]
        digest = hashlib.sha256(json.dumps(identities, sort_keys=True).encode()).hexdigest()[:8]
        names = "-".join(Path(identity["drafter"]).name for identity in identities)
        return Path("slipstream-compare") / f"{names[:MOST_NAME_CHARS]}-{digest}"


def labelled(warnings: Mapping[str, Sequence[str]]) -> list[str]:
    """Warnings by label as one list: those that all have once, the others after their label."""
    common = [text for text in next(iter(warnings.values())) if all(text in found for found in warnings.values())]
    own = [f"{label}: {text}" for label, found in warnings.items() for text in found if text not in common]
    return [*common, *own]


def prepare_match(
    drafters: Sequence[Path],
    settings_of: Callable[[str], BenchmarkSettings],
    choice: TaskChoice,
    say: Callable[[str], None],
) -> Match:
    """Check drafters and target against each other, and plan the samples.

    Args:
        drafters: Native checkpoint folders.
        settings_of: Settings with the drafter of a folder; nothing else differs between two of them.
        choice: Which prompts are decoded.
        say: Hears of downloads.

    Raises:
        UsageError: There are fewer than two drafters, one is there twice, or a task is unknown.
        CheckpointError: A drafter is missing, spoiled, or another target's.
        PromptError: A task's prompts are missing, malformed, empty or all too long.
        TargetError: The target is missing.
    """
    if len(drafters) < 2:
        raise UsageError(
            f"a comparison needs two drafters or more, and {len(drafters)} was given: name another checkpoint folder, "
            "or measure one alone with slipstream eval"
        )
    for drafter in drafters:
        if not (drafter.expanduser() / "config.json").is_file():
            raise CheckpointError(
                f"{drafter} is no drafter checkpoint: it has no config.json that can be read. Give step_<N> folders, "
                "or others in the native format"
            )
    _check_places(drafters)
    entrants: list[Entrant] = []
    for drafter, label in zip(drafters, labels_of(drafters), strict=True):
        session = prepare(settings_of(str(drafter)), choice, say)
        digest = session.identity["drafter_digest"]
        for other in entrants:
            if other.session.identity["drafter_digest"] == digest:
                raise UsageError(
                    f"{other.label} and {label} hold the same config and weights: they would draw. Give each drafter "
                    "once"
                )
        entrants.append(Entrant(label=label, session=session, parameters=count_parameters(drafter.expanduser())))
    return Match(entrants=tuple(entrants))


def labels_of(drafters: Sequence[Path]) -> list[str]:
    """What tells the paths apart: their shortest ends that do, without what all of these end with.

    `a/step_9` and `b/step_9` become a and b, `a/step_8` and `a/step_9` step_8 and step_9. Steps of different runs go by
    their runs, too: `a/step_8` and `b/step_9` stay what they are.
    """
    parts = [drafter.expanduser().absolute().parts for drafter in drafters]
    for length in range(1, max(map(len, parts)) + 1):
        if all(_are_apart(one, other, length) for one, other in combinations(parts, 2)):
            ends = [path[-length:] for path in parts]
            while min(map(len, ends)) > 1 and len({end[-1] for end in ends}) == 1:
                ends = [end[:-1] for end in ends]
            return [str(Path(*end)) for end in ends]
    raise ValueError("equal paths have no different names")


def _are_apart(one: Sequence[str], other: Sequence[str], length: int) -> bool:
    """Whether the ends of two paths, so long, tell which is which."""
    of_two_runs = one[:-1] != other[:-1] and all(path[-1].startswith(STEP) for path in (one, other))
    until = -1 if of_two_runs else None  # the number of a step does not say whose it is
    return one[-length:until] != other[-length:until]


def count_parameters(drafter: Path) -> Parameters:
    """Counts the parameters of a checkpoint, from its file's header.

    Raises:
        CheckpointError: The file cannot be read.
    """
    path = drafter / "model.safetensors"
    try:
        with safe_open(path, "np") as file:
            sizes = {name: prod(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot read the weights of the drafter at {path}: {error}. Give a checkpoint that is whole"
        ) from error
    frozen = sum(size for name, size in sizes.items() if name in TARGETS_OWN)
    return Parameters(own=sum(sizes.values()) - frozen, in_all=sum(sizes.values()))


def _check_places(drafters: Sequence[Path]) -> None:
    places: dict[Path, Path] = {}
    for drafter in drafters:
        place = drafter.expanduser().resolve()
        if place in places:
            raise UsageError(
                f"{places[place]} and {drafter} are the same folder, {place}: give each drafter once"
                if places[place] != drafter
                else f"{drafter} is there twice: give each drafter once"
            )
        places[place] = drafter
