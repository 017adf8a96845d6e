"""Decoded τ of a run's checkpoints: which are measured, and where the results are kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray

from evaluation.actor import EvaluatorActor
from evaluation.report import Report
from services.contracts import Record
from services.errors import CheckpointError
from services.logs import LogPlace
from services.placement import Ask
from services.reading import first_fault, read_json
from trainer.checkpoint import mark_best
from trainer.cluster import Part, check_fits, result_of, start_part, wait_started
from trainer.output import replace_text
from trainer.recipe import Recipe

HOW = {"num_gpus", "threads", "batch_size"}
"""Settings that say how decoding runs, and nothing of what it finds."""


class _Entry(Record):
    """A line of the file."""

    settings: dict[str, Any]
    report: dict[str, Any]


class Evaluations:
    """Decodes held-out prompts with checkpoints, one after the other, beside the training.

    Results are kept as JSON lines in the output directory, so that a resumed run measures nothing twice. Those of other
    settings count for nothing: τ of other prompts, or of other lengths, cannot be compared. `step_best` follows them.
    """

    def __init__(self, recipe: Recipe, target_folder: str, log: Path, place: LogPlace | None = None) -> None:
        self.is_enabled = recipe.evaluation.max_samples > 0 and recipe.prompts.heldout is not None
        """Whether the recipe asks for evaluation at all."""
        self._config = recipe.evaluation
        self._model = target_folder
        self._log = log
        self._place = place
        self._settings = recipe.evaluation.model_dump(exclude=HOW) | {"heldout": recipe.prompts.heldout}
        self._reports = {report.label: report for report in self._read()}
        self._evaluator: Part | None = None
        self._pending: dict[Any, str] = {}

    def check(self) -> None:
        """Check that an evaluator could ever be placed.

        Raises:
            PlacementError: The cluster has fewer GPUs than it asks for.
        """
        if self.is_enabled:
            check_fits(EvaluatorActor.__name__, Ask(num_gpus=self._config.num_gpus))

    def report(self, checkpoint: Path) -> Report | None:
        """The result of a checkpoint, if it has been measured."""
        return self._reports.get(checkpoint.name)

    def request(self, checkpoint: Path, prompts: list[list[int]]) -> None:
        """Measure a checkpoint on prompts (token ids), unless that is done or under way."""
        if not self.is_enabled or checkpoint.name in self._reports or checkpoint.name in self._pending.values():
            return
        if self._evaluator is None:
            self._evaluator = start_part(
                EvaluatorActor,
                self._model,
                prompts,
                self._config,
                ask=Ask(num_gpus=self._config.num_gpus),
                log=self._place,
            )
        self._pending[self._evaluator.actor.evaluate.remote(str(checkpoint), checkpoint.name)] = checkpoint.name

    def wait_started(self, look: Callable[[], None] = lambda: None) -> None:
        """Wait until the evaluator, if there is work for one, has loaded its target.

        Args:
            look: Called while waiting; what it raises ends the wait.

        Raises:
            PlacementError: It is not placed.
            SlipstreamError: It cannot load the target.
        """
        if self._evaluator is not None and self._pending:
            wait_started([self._evaluator], look)

    def collect(self, *, timeout_s: float = 0.0) -> list[Report]:
        """Results that have come in since the last call; waits up to `timeout_s` for the first.

        Raises:
            SlipstreamError: The evaluator failed or died; what was under way can be requested anew.
        """
        if not self._pending or self._evaluator is None:
            return []
        done, _ = ray.wait(list(self._pending), num_returns=1, timeout=timeout_s)
        try:
            if done:
                result_of(self._evaluator.started, "the evaluator")
            reports: list[Report] = [result_of(future, "the evaluator") for future in done]
        except BaseException:
            self.close()
            raise
        for future in done:
            del self._pending[future]
        self._reports |= {report.label: report for report in reports}
        if reports:
            self._write()
        return reports

    @property
    def is_idle(self) -> bool:
        """Whether nothing is being measured."""
        return not self._pending

    def close(self) -> None:
        """End the evaluator and what it measures. Again: nothing happens."""
        self._pending.clear()
        if self._evaluator is not None:
            ray.kill(self._evaluator.actor)
            self._evaluator = None

    def _read(self) -> list[Report]:
        """The results of these settings; those of others may be of another version and are left as they are.

        Raises:
            CheckpointError: A line is no result.
        """
        lines = self._log.read_bytes().splitlines() if self._log.exists() else []
        reports = []
        for number, line in enumerate(lines, start=1):
            try:
                entry = _Entry.model_validate(read_json(line))
                if entry.settings == self._settings:
                    reports.append(Report.model_validate(entry.report))
            except ValueError as error:
                raise CheckpointError(
                    f"{self._log}:{number}: no result of decoding: {first_fault(error)}. Take the line out: its "
                    "checkpoint is decoded with again"
                ) from error
        return reports

    def _write(self) -> None:
        entries = (
            {"settings": self._settings, "report": report.model_dump(mode="json")} for report in self._reports.values()
        )
        replace_text(self._log, "".join(json.dumps(entry) + "\n" for entry in entries))
        mark_best(self._log.parent, {label: report.accepted_length for label, report in self._reports.items()})
