"""Fitted temperatures as a small file in the drafter's folder. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field

from services.contracts import Record
from services.errors import CheckpointError
from services.files import replace_text
from services.reading import first_fault, read_json

TEMPERATURES_NAME = "confidence_temperatures.json"

Temperature = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class ConfidenceTemperatures(Record):
    """What confidence logits are divided by, and what that was fitted on."""

    temperatures: tuple[Temperature, ...] = Field(min_length=1)
    """One a slot."""
    decoding_temperature: float
    """At which the rounds were decoded: acceptance, and so calibration, depends on it."""
    tasks: tuple[str, ...]
    """What the prompts were of."""
    num_samples: int
    num_rounds: int

    def save(self, folder: Path | str) -> Path:
        """Write the file into a drafter's folder, whole or not at all; returns its path.

        Raises:
            CheckpointError: The folder cannot be written to.
        """
        path = Path(folder) / TEMPERATURES_NAME
        try:
            replace_text(path, self.model_dump_json(indent=2) + "\n")
        except OSError as error:
            raise CheckpointError(
                f"cannot save the fitted temperatures beside the drafter: {error}. With --no-save they go to "
                "--output-dir alone"
            ) from error
        return path

    @classmethod
    def load(cls, folder: Path | str) -> ConfidenceTemperatures:
        """Read the file of a drafter's folder.

        Raises:
            CheckpointError: There is none, or it is spoiled.
        """
        path = Path(folder) / TEMPERATURES_NAME
        try:
            return cls.model_validate(read_json(path.read_bytes()))
        except FileNotFoundError as error:
            raise CheckpointError(
                f"{folder} has no {TEMPERATURES_NAME}: fit temperatures first with slipstream confidence, or decode "
                "with the head's own confidences"
            ) from error
        except OSError as error:
            raise CheckpointError(f"cannot read the fitted temperatures: {error}") from error
        except ValueError as error:
            raise CheckpointError(
                f"{path} holds no fitted temperatures: {first_fault(error)}. Fit them again with slipstream confidence"
            ) from error


def check_num_temperatures(temperatures: Sequence[float], num_drafts: int, drafter: str) -> None:
    """Check that there is a temperature for each token that a drafter drafts.

    Raises:
        CheckpointError: There is not.
    """
    if len(temperatures) != num_drafts:
        raise CheckpointError(
            f"there are temperatures for {len(temperatures)} drafted tokens, but the drafter at {drafter} drafts "
            f"{num_drafts}: its {TEMPERATURES_NAME} is another drafter's. Fit them again with slipstream confidence"
        )
