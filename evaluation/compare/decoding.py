"""Decodes with several drafters of one target, which is loaded once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from transformers.utils.logging import disable_progress_bar

from evaluation.benchmark import BenchmarkSettings
from evaluation.loading import load_models
from evaluation.sample_decoder import SampleDecoder
from evaluation.session import Decode


@contextmanager
def decoding_with_each(settings: Sequence[BenchmarkSettings]) -> Iterator[Sequence[Decode]]:
    """Decodes in this process (an `evaluation.compare.match.StartMatch`).

    Raises:
        TargetError: The target cannot be loaded.
        CheckpointError: A drafter cannot, or is another target's.
    """
    disable_progress_bar()  # of loading: there is one of ours
    first = load_models(settings[0])
    models = [first, *(load_models(other, beside=first) for other in settings[1:])]
    yield [SampleDecoder(*pair).decode_all for pair in zip(settings, models, strict=True)]
