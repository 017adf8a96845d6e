"""Decodes benchmark samples, speculatively and by the target alone, and records each as it ends."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from transformers.utils.logging import disable_progress_bar

from drafters.drafter import GREEDY_BELOW, Drafter
from evaluation.batch_decoder import BatchDecoder, RoundRecord, Row, cut_below
from evaluation.benchmark import BenchmarkSettings, Sample
from evaluation.confidence.temperatures import check_num_temperatures
from evaluation.loading import Models, load_models
from evaluation.lossless import find_divergence
from evaluation.records import PlainRecord, SampleKey, SampleRecord, hash_of
from evaluation.report import Divergence
from evaluation.session import Decode, OnRecord
from evaluation.timing import PHASES, PhaseClock, Timing
from evaluation.work import Work
from services.errors import TargetError

WARM_TOKENS = 8

CONFIDENCE_DIGITS = 4
"""Decimals of a recorded confidence logit: far below what its float32 means."""


@contextmanager
def decoding_here(settings: BenchmarkSettings) -> Iterator[Decode]:
    """Decodes in this process (an `evaluation.session.StartDecoding`)."""
    disable_progress_bar()  # of loading: there is one of ours
    yield SampleDecoder(settings, load_models(settings)).decode_all


class SampleDecoder:
    """Decodes with a target and a drafter.

    Args:
        settings: How to decode.
        models: What they name.

    Raises:
        CheckpointError: The drafter was calibrated for another number of drafts.
    """

    def __init__(self, settings: BenchmarkSettings, models: Models) -> None:
        self._settings = settings
        self._models = models
        self._device = torch.device(settings.device)
        self._is_warm = False
        if settings.confidence_temperatures is not None:
            check_num_temperatures(
                settings.confidence_temperatures, models.drafter.settings.num_drafts, settings.drafter
            )

    def decode_all(self, works: Sequence[Work], on_record: OnRecord) -> None:
        """`decode`, one piece of work after the other (an `evaluation.session.Decode`)."""
        for work in works:
            self.decode(work, on_record)

    def decode(self, work: Work, on_record: OnRecord) -> None:
        """Decode what is to be done.

        Args:
            work: Samples.
            on_record: Called with each record, as its sample ends.

        Raises:
            TargetError: The device has too little memory for so many at once.
        """
        try:
            if self._settings.measure_speedup and not self._is_warm:
                self._warm_up((work.speculative or work.plain)[0])
            outputs = self._run(work.speculative, self._models.drafter, on_record, {})
            self._run(work.plain, None, on_record, outputs)
        except torch.OutOfMemoryError as error:
            raise TargetError(
                f"{self._device} has too little memory for {self._settings.batch_size} samples of up to "
                f"{self._settings.max_new_tokens} new tokens at once: lower --batch-size ({error})"
            ) from error

    def _warm_up(self, sample: Sample) -> None:
        """The first passes of a process load kernels and touch memory: neither side of a speedup shall pay for that."""
        for drafter in (self._models.drafter, None):
            decoder = BatchDecoder(
                self._models.target,
                drafter,
                max_rows=1,
                max_new_tokens=WARM_TOKENS,
                temperature=self._settings.temperature,
                stop_token_ids=self._models.stop_token_ids,
            )
            with decoder:
                decoder.add([Row(0, list(sample.prompt_ids), sample.seed)])
                while decoder.rows:
                    decoder.round()
        self._is_warm = True

    def _run(
        self,
        samples: Sequence[Sample],
        drafter: Drafter | None,
        on_record: OnRecord,
        others: Mapping[SampleKey, Sequence[int]],
    ) -> dict[SampleKey, Sequence[int]]:
        """Decode samples with a drafter or by the target alone.

        Args:
            samples: Any number.
            drafter: None: none.
            on_record: Called with each record.
            others: What the other side decoded of them, prompts included.

        Returns:
            What was decoded, likewise.
        """
        if not samples:
            return {}
        outputs: dict[SampleKey, Sequence[int]] = {}
        settings = self._settings
        clock = PhaseClock(self._device)
        shares: defaultdict[int, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        confidence: defaultdict[int, list[tuple[float, ...]]] = defaultdict(list)

        def note_confidence(record: RoundRecord) -> None:
            if record.proposal.confidence is None:
                return
            lengths = record.proposal.lengths
            for place, logits in enumerate(record.proposal.confidence.tolist()):
                drafted = logits if lengths is None else logits[: int(lengths[place])]
                confidence[record.rows[place].index].append(tuple(round(x, CONFIDENCE_DIGITS) for x in drafted))

        decoder = BatchDecoder(
            self._models.target,
            drafter,
            max_rows=min(settings.batch_size, len(samples)),
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            stop_token_ids=self._models.stop_token_ids,
            cut=cut_below(settings.confidence_threshold, settings.confidence_temperatures),
            on_round=note_confidence,
            clock=clock,
        )
        waiting = deque(Row(place, list(sample.prompt_ids), sample.seed) for place, sample in enumerate(samples))
        with decoder:
            before = clock.timing(0)
            while waiting or decoder.rows:
                room = settings.batch_size - len(decoder.rows)
                with clock.running():
                    if waiting and room:
                        served = [waiting.popleft() for _ in range(min(room, len(waiting)))]
                        ended = decoder.add(served)
                    else:
                        served = list(decoder.rows)
                        ended = decoder.round()
                now = clock.timing(0)
                for row in served:
                    for name in PHASES:
                        spent_s = getattr(now, name) - getattr(before, name)
                        shares[row.index][name] += max(0.0, spent_s) / len(served)
                before = now
                for row in ended:
                    timing = Timing(**shares.pop(row.index), num_tokens=len(row.tokens) - row.num_prompt)
                    logits = confidence.pop(row.index, None)
                    sample = samples[row.index]
                    outputs[sample.key] = row.tokens
                    if drafter is None:
                        on_record(_plain_record(sample, row, timing, self._divergence(sample, row, others)))
                    else:
                        on_record(_sample_record(sample, row, timing, logits))
        return outputs

    def _divergence(self, sample: Sample, row: Row, others: Mapping[SampleKey, Sequence[int]]) -> Divergence | None:
        if self._settings.temperature >= GREEDY_BELOW or sample.key not in others:
            return None
        return find_divergence(
            self._models.target,
            others[sample.key],
            row.tokens,
            sample=sample.index,
            num_prompt_tokens=row.num_prompt,
        )


def _plain_record(sample: Sample, row: Row, timing: Timing, divergence: Divergence | None) -> PlainRecord:
    return PlainRecord(
        task=sample.task,
        index=sample.index,
        prompt_hash=sample.prompt_hash,
        output_hash=hash_of(row.tokens[row.num_prompt :]),
        timing=timing,
        divergence=divergence,
    )


def _sample_record(
    sample: Sample, row: Row, timing: Timing, confidence: Sequence[tuple[float, ...]] | None
) -> SampleRecord:
    return SampleRecord(
        task=sample.task,
        domain=sample.domain,
        index=sample.index,
        prompt_hash=sample.prompt_hash,
        num_prompt_tokens=row.num_prompt,
        seed=sample.seed,
        accepted_lengths=tuple(entry.committed for entry in row.rounds),
        proposal_lengths=tuple(entry.proposed for entry in row.rounds),
        accepted_draft_lengths=tuple(entry.accepted for entry in row.rounds),
        confidence=None if confidence is None else tuple(confidence),
        output_hash=hash_of(row.tokens[row.num_prompt :]),
        timing=timing,
    )
