"""The evaluator as a Ray actor. Importing this module imports no torch: the driver does it too."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from evaluation.config import EvaluationConfig
from services.memory import keep_freed_memory

if TYPE_CHECKING:
    from evaluation.report import Report


logger = logging.getLogger(__name__)


class EvaluatorActor:
    """An `Evaluator` in a process of its own; same arguments, same `evaluate`."""

    def __init__(self, model: str, prompts: list[list[int]], config: EvaluationConfig) -> None:
        keep_freed_memory()
        from evaluation.evaluator import Evaluator

        self._evaluator = Evaluator(model, prompts, config)

    def evaluate(self, checkpoint: str, label: str) -> Report:
        """Decode the held-out prompts with a checkpoint; see `Evaluator.evaluate`."""
        report = self._evaluator.evaluate(checkpoint, label)
        logger.info("%s: accepted length %.3f", label, report.accepted_length)
        return report
