"""Decodes with several drafters of one target, which is loaded once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from typing import Self

import torch
from transformers.utils.logging import disable_progress_bar

from evaluation.benchmark import BenchmarkSettings
from evaluation.loading import load_drafter_of
from evaluation.origin import check_origin
from evaluation.sample_decoder import SampleDecoder
from evaluation.session import Decode, OnRecord
from evaluation.work import Work
from services.models import find_model


class SharedTargetDecoder(SampleDecoder):
    """A decoder whose target others can use, too."""

    def beside(self, settings: BenchmarkSettings) -> Self:
        """A decoder with another drafter of the same target.

        Raises:
            CheckpointError: The drafter cannot be loaded, or is another target's.
        """
        folder = find_model(settings.target, weights=True)
        check_origin(Path(settings.drafter), folder, allow_other_target=settings.allow_other_target)
        other = copy(self)
        other._settings = settings
        dtype: torch.dtype = getattr(torch, settings.dtype)
        other._drafter = load_drafter_of(self._target, settings.drafter, dtype, self._device)
        return other


@contextmanager
def decoding_with_each(settings: Sequence[BenchmarkSettings]) -> Iterator[Sequence[Decode]]:
    """Decodes in this process (an `evaluation.compare.match.StartMatch`).

    Raises:
        TargetError: The target cannot be loaded.
        CheckpointError: A drafter cannot, or is another target's.
    """
    disable_progress_bar()  # of loading: there is one of ours
    first = SharedTargetDecoder(settings[0])
    yield [_decode_with(decoder) for decoder in (first, *map(first.beside, settings[1:]))]


def _decode_with(decoder: SampleDecoder) -> Decode:
    def decode(works: Sequence[Work], on_record: OnRecord) -> None:
        for work in works:
            decoder.decode(work, on_record)

    return decode
