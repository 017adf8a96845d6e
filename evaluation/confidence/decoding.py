"""Decodes a confidence study's samples, and measures its steps, with a target and a drafter that are loaded once."""

from __future__ import annotations

from itertools import cycle, islice

from transformers.utils.logging import disable_progress_bar

from evaluation.benchmark import BenchmarkSettings
from evaluation.confidence.measuring import measure_step_times
from evaluation.confidence.step_times import StepTimes
from evaluation.loading import load_models
from evaluation.sample_decoder import SampleDecoder
from evaluation.session import Decode, Session


class StudyDecoder:
    """An `evaluation.confidence.study.Decoder` in this process.

    Args:
        session: Whose settings say what is loaded, and how; its prompts are what steps are measured on.

    Raises:
        TargetError: The target cannot be loaded.
        CheckpointError: The drafter cannot, or is another target's.
    """

    def __init__(self, session: Session) -> None:
        disable_progress_bar()  # of loading: there is one of ours
        self._models = load_models(session.settings)
        self._text = [token for task in session.tasks for sample in task.samples for token in sample.prompt_ids]

    def decoding(self, settings: BenchmarkSettings) -> Decode:
        """Decodes with these settings, whose target and drafter are its own."""
        return SampleDecoder(settings, self._models).decode_all

    def step_times(self, num_requests: int, context_tokens: int, tokens_observed: int) -> StepTimes:
        """Measures the steps of so many requests, each with so much context of the prompts' text."""
        context = list(islice(cycle(self._text), context_tokens))
        target, drafter, _ = self._models
        return measure_step_times(target, drafter, num_requests, context, tokens_observed=tokens_observed)
