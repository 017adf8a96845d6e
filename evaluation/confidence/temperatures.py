"""Fitted temperatures as a small file in the drafter's folder. No torch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

from pydantic import Field

from services.contracts import Record
from services.errors import CheckpointError
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
        new = path.with_name(f".{TEMPERATURES_NAME}.{os.getpid()}")
        try:
            new.write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")
            new.replace(path)
        except OSError as error:
            raise CheckpointError(
                f"cannot save the fitted temperatures beside the drafter: {error}. With --no-save they go to "
                "--output-dir alone"
            ) from error
        finally:
            new.unlink(missing_ok=True)
        return path

    @classmethod
    def load(cls, folder: Path | str, num_drafts: int) -> ConfidenceTemperatures:
        """Read the file of a drafter's folder.

        Args:
            folder: Of the drafter.
            num_drafts: γ of the drafter.

        Raises:
            CheckpointError: There is none, it is spoiled, or it has another number of slots.
        """
        path = Path(folder) / TEMPERATURES_NAME
        try:
            fitted = cls.model_validate(read_json(path.read_bytes()))
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
        if len(fitted.temperatures) != num_drafts:
            raise CheckpointError(
                f"{path} has temperatures for {len(fitted.temperatures)} drafted tokens, but the drafter drafts "
                f"{num_drafts}: it is another drafter's. Fit them again with slipstream confidence"
            )
        return fitted
