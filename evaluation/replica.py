"""One of several processes that decode benchmark samples. Importing this module imports no torch: the driver does."""

from __future__ import annotations

from evaluation.benchmark import BenchmarkSettings
from evaluation.records import PlainRecord, SampleRecord
from evaluation.work import Work
from services.memory import keep_freed_memory


class DecodingReplica:
    """A `SampleDecoder` in a process of its own."""

    def __init__(self, settings: BenchmarkSettings) -> None:
        keep_freed_memory()
        from evaluation.loading import load_models
        from evaluation.sample_decoder import SampleDecoder

        self._decoder = SampleDecoder(settings, load_models(settings))

    def decode(self, work: Work) -> list[SampleRecord | PlainRecord]:
        """The records of a piece of work."""
        records: list[SampleRecord | PlainRecord] = []
        self._decoder.decode(work, records.append)
        return records
