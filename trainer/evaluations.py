"""Decoded τ of a run's checkpoints: the evaluator that measures them, and where the results are kept."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ray

from evaluation.actor import EvaluatorActor
from evaluation.report import Report
from evaluation.weights import weights_digest
from services.contracts import HeldoutPrompt, Record
from services.errors import CheckpointError
from services.files import replace_text
from services.logs import LogPlace
from services.placement import SMALLEST_AMOUNT, Ask
from services.reading import first_fault, read_json
from trainer.checkpoint import checkpoint_step, hold, let_go, mark_best
from trainer.cluster import Part, check_fits, result_of, start_part, wait_started
from trainer.recipe import Recipe

HOW = {"num_gpus", "threads", "batch_size", "placement", "every", "during_samples", "wait_s", "max_samples"}
"""Settings that say how, when and on how many prompts decoding runs, and nothing of what it finds on each."""

LABEL = re.compile(r"step_\d+")


class _Key(NamedTuple):
    """What a result is of. The same folder may hold another drafter later: a group that begins anew trains anew."""

    label: str
    weights: str
    num_samples: int


class _Entry(Record):
    """A line of the file."""

    settings: dict[str, Any]
    num_samples: int = 0
    """How many prompts were asked for."""
    report: dict[str, Any]


class _Request(NamedTuple):
    call: Any
    key: _Key
    checkpoint: Path
    began_s: float


class Evaluations:
    """Decodes held-out prompts with one checkpoint after another, beside the training.

    Results are kept as JSON lines in the output directory, so that a resumed run measures nothing twice. Those of other
    settings, or of other weights, count for nothing. `step_best` follows them.

    Args:
        recipe: The run's.
        target_folder: The target's.
        log: File of the results.
        place: Where the evaluator logs to.
    """

    def __init__(self, recipe: Recipe, target_folder: str, log: Path, place: LogPlace | None = None) -> None:
        self.config = recipe.evaluation
        self.is_enabled = recipe.evaluation.max_samples > 0 and recipe.prompts.heldout is not None
        """Whether the recipe asks for evaluation at all."""
        self._model = target_folder
        self._log = log
        self._place = place
        self._labels = recipe.target.labels if recipe.evaluation.placement == "share_target" else {}
        self._settings = recipe.evaluation.model_dump(exclude=HOW) | {"heldout": recipe.prompts.heldout}
        self._others: list[_Entry] = []
        self._reports = self._read()
        self._evaluator: Part | None = None
        self._request: _Request | None = None

    def check(self) -> None:
        """Check that an evaluator could ever be placed.

        Raises:
            PlacementError: The cluster has fewer GPUs than it asks for.
        """
        let_go(self._log.parent)  # what a killed attempt held
        if self.is_enabled:
            check_fits(EvaluatorActor.__name__, self._ask())

    def report(self, checkpoint: Path, num_samples: int | None = None) -> Report | None:
        """The result of a checkpoint on so many prompts (None: all), if it has been measured as it is now."""
        try:
            weights = weights_digest(checkpoint)
        except FileNotFoundError:
            return None
        return self._reports.get(_Key(checkpoint.name, weights, num_samples or self.config.max_samples))

    def has_measured(self, checkpoint: Path) -> bool:
        """Whether it has been measured as it is now, on as many prompts as during training or on all."""
        return any(self.report(checkpoint, num_samples) for num_samples in (self.config.num_during, None))

    def last_step(self, newest: int) -> int:
        """The last measured checkpoint up to a step; those that have been deleted since count too."""
        steps = (checkpoint_step(Path(key.label)) for key in self._reports)
        return max((step for step in steps if step <= newest), default=0)

    def request(
        self,
        checkpoint: Path,
        prompts: Sequence[HeldoutPrompt],
        num_samples: int | None = None,
        *,
        during: bool = False,
        beside: str | None = None,
    ) -> bool:
        """Measure a checkpoint, unless that is done. One is measured at a time, and held meanwhile.

        Args:
            checkpoint: Its folder.
            prompts: All that the evaluator may ever decode.
            num_samples: How many of them, the first; None decodes `evaluation.max_samples`.
            during: Training goes on meanwhile.
            beside: Address of the node that a new evaluator shall share.

        Returns:
            False if the checkpoint has been deleted.

        Raises:
            PlacementError: No node could hold the evaluator.
        """
        assert self.is_idle, "one at a time"
        if not self.is_enabled or self.report(checkpoint, num_samples) is not None:
            return True
        try:
            hold(self._log.parent, checkpoint)
            weights = weights_digest(checkpoint)
        except FileNotFoundError:
            return False
        key = _Key(checkpoint.name, weights, num_samples or self.config.max_samples)
        if self._evaluator is None:
            self._evaluator = start_part(
                EvaluatorActor, self._model, prompts, self.config, during, ask=self._ask(beside), log=self._place
            )
        call = self._evaluator.actor.evaluate.remote(str(checkpoint), key.label, key.num_samples, during=during)
        self._request = _Request(call, key, checkpoint, time.time())
        return True

    def wait_started(self, look: Callable[[], None] = lambda: None) -> None:
        """Wait until the evaluator, if there is work for one, has loaded its target.

        Args:
            look: Called while waiting; what it raises ends the wait.

        Raises:
            PlacementError: It is not placed.
            SlipstreamError: It cannot load the target.
        """
        if self._evaluator is not None and self._request is not None:
            wait_started([self._evaluator], look)

    def collect(self, *, timeout_s: float = 0.0) -> Report | None:
        """The result of what was requested, once it is there; waits up to `timeout_s` for it.

        A checkpoint that was deleted or replaced meanwhile has none, and no error.

        Raises:
            SlipstreamError: The evaluator failed or died; what was under way can be requested anew.
        """
        if self._request is None or self._evaluator is None:
            return None
        call, key, checkpoint, began_s = self._request
        done, _ = ray.wait([call], timeout=timeout_s)
        if not done:
            return None
        try:
            result_of(self._evaluator.started, "the evaluator")
            report: Report = result_of(call, "the evaluator").model_copy(update={"began_s": began_s})
        except CheckpointError:
            self._end_request()
            if _is_still(key, checkpoint):
                raise
            return None
        except BaseException:
            self.close()
            raise
        self._reports[_Key(key.label, report.weights, key.num_samples)] = report
        self._write()
        self._end_request()
        return report

    @property
    def is_idle(self) -> bool:
        """Whether nothing is being measured."""
        return self._request is None

    @property
    def under_way(self) -> str | None:
        """Name of the checkpoint that is being measured."""
        return self._request.key.label if self._request else None

    def close(self) -> None:
        """End the evaluator and what it measures. Again: nothing happens."""
        self._end_request()
        if self._evaluator is not None:
            ray.kill(self._evaluator.actor)
            self._evaluator = None

    def _end_request(self) -> None:
        if self._request is not None:
            self._request = None
            let_go(self._log.parent)

    def _ask(self, beside: str | None = None) -> Ask:
        node = {f"node:{beside}": SMALLEST_AMOUNT} if beside else {}
        return Ask(num_gpus=self.config.num_gpus, resources=node, labels=self._labels)

    def _read(self) -> dict[_Key, Report]:
        """The results of these settings; those of others may be of another version and are left as they are.

        Raises:
            CheckpointError: A line is no result.
        """
        lines = self._log.read_bytes().splitlines() if self._log.exists() else []
        reports = {}
        for number, line in enumerate(lines, start=1):
            try:
                entry = _Entry.model_validate(read_json(line))
                if entry.settings != self._settings:
                    self._others.append(entry)
                    continue
                report = Report.model_validate(entry.report)
                if not LABEL.fullmatch(report.label):
                    raise ValueError(f"label: {report.label!r} is no checkpoint's")
            except ValueError as error:
                raise CheckpointError(
                    f"{self._log}:{number}: no result of decoding: {first_fault(error)}. Take the line out: its "
                    "checkpoint is decoded with again"
                ) from error
            reports[_Key(report.label, report.weights, entry.num_samples)] = report
        return reports

    def _write(self) -> None:
        entries = self._others + [
            _Entry(settings=self._settings, num_samples=key.num_samples, report=report.model_dump(mode="json"))
            for key, report in self._reports.items()
        ]
        replace_text(self._log, "".join(entry.model_dump_json() + "\n" for entry in entries))
        mark_best(self._log.parent, self._accepted_lengths())

    def _accepted_lengths(self) -> dict[str, float]:
        """τ by name of the checkpoints that are as they were measured, over the prompts that all were measured on."""
        reports = {
            key.label: report
            for key, report in sorted(self._reports.items(), key=lambda item: item[0].num_samples)
            if _is_still(key, self._log.parent / key.label)
        }
        fewest = min((len(report.samples) for report in reports.values()), default=0)
        return {label: report.accepted_length_of_first(fewest) for label, report in reports.items()}


def _is_still(key: _Key, checkpoint: Path) -> bool:
    """Whether a folder is there and holds what a result is of."""
    try:
        return weights_digest(checkpoint) == key.weights
    except FileNotFoundError:
        return False
