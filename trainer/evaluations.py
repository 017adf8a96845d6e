"""Decoded τ of a run's checkpoints: which are due, which are measured, and where the results are kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray

from evaluation.actor import EvaluatorActor
from evaluation.report import Report
from trainer.cluster import Part, result_of, start_part
from trainer.recipe import Recipe


class Evaluations:
    """Decodes held-out prompts with checkpoints, one after the other, beside the training.

    Results are kept as JSON lines in the output directory, so that a resumed run measures nothing twice.
    """

    def __init__(self, recipe: Recipe, log: Path) -> None:
        self._recipe = recipe
        self._log = log
        self._reports = {report.label: report for report in _read(log)}
        self._evaluator: Part | None = None
        self._pending: dict[Any, str] = {}

    @property
    def enabled(self) -> bool:
        """Whether the recipe asks for evaluation at all."""
        return self._recipe.evaluation.max_samples > 0 and self._recipe.prompts.heldout is not None

    def report(self, checkpoint: Path) -> Report | None:
        """The result of a checkpoint, if it has been measured."""
        return self._reports.get(checkpoint.name)

    def reports(self) -> list[Report]:
        """All results, by step."""
        return sorted(self._reports.values(), key=lambda report: int(report.label.removeprefix("step_")))

    def request(self, checkpoint: Path, prompts: Callable[[int], list[list[int]]]) -> None:
        """Measure a checkpoint unless that is done or under way; `prompts(n)` gives the held-out token ids."""
        if not self.enabled or checkpoint.name in self._reports or checkpoint.name in self._pending.values():
            return
        config = self._recipe.evaluation
        if self._evaluator is None:
            self._evaluator = start_part(
                EvaluatorActor, self._recipe.target.model, prompts(config.max_samples), config, num_gpus=config.num_gpus
            )
        self._pending[self._evaluator.actor.evaluate.remote(str(checkpoint), checkpoint.name)] = checkpoint.name

    def collect(self, *, timeout_s: float = 0.0) -> list[Report]:
        """Results that have come in since the last call; waits up to `timeout_s` for the first."""
        if not self._pending:
            return []
        done, _ = ray.wait(list(self._pending), num_returns=1, timeout=timeout_s)
        reports = []
        for future in done:
            self._pending.pop(future)
            report: Report = result_of(future)
            self._reports[report.label] = report
            with self._log.open("a") as log:
                log.write(report.model_dump_json() + "\n")
            reports.append(report)
        return reports

    @property
    def is_idle(self) -> bool:
        """Whether nothing is being measured."""
        return not self._pending

    def close(self) -> None:
        """End the evaluator."""
        if self._evaluator is not None:
            ray.kill(self._evaluator.actor)
            self._evaluator = None


def _read(log: Path) -> list[Report]:
    if not log.exists():
        return []
    return [Report.model_validate(json.loads(line)) for line in log.read_text().splitlines()]
