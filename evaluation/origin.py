"""Which target a drafter was trained with, and in which chat-template mode: as its provenance says. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from services.errors import CheckpointError
from services.models import read_shape
from services.reading import first_fault, read_json

PROVENANCE_FILE = "provenance.json"


class Origin(BaseModel):
    """The `target` entry of a checkpoint's provenance; what it does not say is None.

    Attributes:
        model: The target as the recipe named it.
        fingerprint: The target's.
        enable_thinking: Chat-template mode of the training prompts.
    """

    model_config = ConfigDict(frozen=True)

    model: str | None = None
    fingerprint: str | None = None
    enable_thinking: bool | None = None


def read_origin(checkpoint: Path) -> Origin:
    """What a checkpoint says of where it comes from; nothing where it has no provenance, as released ones.

    Raises:
        CheckpointError: There is no checkpoint, or its provenance is spoiled.
    """
    if not (checkpoint / "config.json").is_file():
        raise CheckpointError(
            f"{checkpoint} is no drafter checkpoint: it has no config.json. Give --drafter a step_<N> folder, or "
            "another one in the native format"
        )
    path = checkpoint / PROVENANCE_FILE
    if not path.exists():
        return Origin()
    try:
        provenance: Any = read_json(path.read_bytes())
        if not isinstance(provenance, dict):
            raise ValueError(f"a JSON {type(provenance).__name__}, not an object")
        return Origin.model_validate(provenance.get("target", {}))
    except ValueError as error:
        raise CheckpointError(
            f"{path} does not say where the drafter comes from: {first_fault(error)}. Put the file back, or remove it"
        ) from error


def is_other_target(origin: Origin, target_folder: Path) -> bool:
    """Whether a drafter was trained with a target of another fingerprint, as far as that is known."""
    return origin.fingerprint is not None and origin.fingerprint != read_shape(target_folder).fingerprint


def check_origin(checkpoint: Path, target_folder: Path, *, allow_other_target: bool) -> Origin:
    """Check that a drafter was trained with this target.

    Raises:
        CheckpointError: It was trained with another one, and that is not allowed.
    """
    origin = read_origin(checkpoint)
    if is_other_target(origin, target_folder) and not allow_other_target:
        raise CheckpointError(
            f"the drafter at {checkpoint} was trained with {origin.model or 'a target'} (fingerprint "
            f"{origin.fingerprint}), but the target at {target_folder} has fingerprint "
            f"{read_shape(target_folder).fingerprint}: give --target the one it was trained with, or --other-target to "
            "measure it on this one all the same"
        )
    return origin
