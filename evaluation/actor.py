"""The evaluator as a Ray actor. Importing this module imports no torch: the driver does it too."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

from evaluation.config import EvaluationConfig
from services.contracts import HeldoutPrompt
from services.memory import keep_freed_memory

if TYPE_CHECKING:
    from evaluation.evaluator import Evaluator
    from evaluation.report import Report

LOWEST_PRIORITY = 19

Result = TypeVar("Result")

logger = logging.getLogger(__name__)


class EvaluatorActor:
    """An `Evaluator` in a process of its own.

    What it does during training it does in a thread of its own, which gives way to everything else where the config
    asks for that. Linux schedules threads one by one, and none can raise its own priority again: what comes after
    training is done by another thread.

    Args:
        model: Folder or hub name of the target.
        prompts: To decode.
        config: The recipe's evaluation section.
        during: Whether training goes on while the target is loaded.
    """

    def __init__(
        self, model: str, prompts: Sequence[HeldoutPrompt], config: EvaluationConfig, during: bool = False
    ) -> None:
        keep_freed_memory()
        self._quiet = ThreadPoolExecutor(1, "during-training", _give_way if config.is_low_priority else None)
        self._threads = {False: config.threads, True: config.threads_during}

        def load() -> Evaluator:
            from evaluation.evaluator import Evaluator

            return Evaluator(model, prompts, config)

        self._evaluator = self._do(during, load)

    def evaluate(self, checkpoint: str, label: str, num_samples: int, *, during: bool = False) -> Report:
        """Decode the first held-out prompts with a checkpoint; see `Evaluator.evaluate`."""

        def decode() -> Report:
            return self._evaluator.evaluate(checkpoint, label, num_samples, threads=self._threads[during])

        report = self._do(during, decode)
        logger.info("%s: accepted length %.3f over %d prompts", label, report.accepted_length, report.num_samples)
        return report

    def _do(self, during: bool, work: Callable[[], Result]) -> Result:
        return self._quiet.submit(work).result() if during else work()


def _give_way() -> None:
    os.setpriority(os.PRIO_PROCESS, 0, LOWEST_PRIORITY)  # of the calling thread
