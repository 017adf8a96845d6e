"""Figures of an evaluation, by task, by domain and over all, from its records (docs/evaluation.md). No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from evaluation import metrics
from evaluation.benchmark import PlannedTask
from evaluation.records import PlainRecord, SampleKey, SampleRecord
from evaluation.report import Divergence
from evaluation.tasks import DOMAINS
from evaluation.timing import Timing, total
from services.contracts import Record


class Figures(Record):
    """What a group of samples gave. Figures of rounds are None where every sample ended at its first token.

    Attributes:
        accepted_length: τ, the bonus token included.
        interval: Its 95 % bootstrap interval over samples.
        accept_rate: accept_rate@k by position.
        cond_accept_rate: cond_accept_rate@k by position; None where no round got that far.
        draft_tokens_per_proposal: Mean proposal length.
        verify_rate: Σ accepted length / Σ (proposal length + 1).
        speedup: Wall time a token of plain decoding / of speculative decoding; None if it was not measured.
        samples: Decoded.
        skipped: Left out, because the prompt is longer than the target's context.
        rounds: Of all samples.
        new_tokens: Of all samples.
        differing: Samples whose greedy output is not the target's own; None above temperature 0 or unmeasured.
        divergences: Where they left it, as far as both sides were decoded in one go.
        speculative: Where the time went.
        plain: Where the time of plain decoding went; None if it was not measured.
        published: τ that was published for this target and kind of drafter, where there is one.
    """

    accepted_length: float | None
    interval: tuple[float, float] | None
    accept_rate: tuple[float, ...]
    cond_accept_rate: tuple[float | None, ...]
    draft_tokens_per_proposal: float | None
    verify_rate: float | None
    speedup: float | None
    samples: int
    skipped: int = 0
    rounds: int
    new_tokens: int
    differing: int | None
    divergences: tuple[Divergence, ...] = ()
    speculative: Timing
    plain: Timing | None
    published: float | None = None


class Results(Record):
    """An evaluation: figures of each task and domain, and over all samples."""

    tasks: dict[str, Figures]
    domains: dict[str, Figures]
    overall: Figures


def collect_results(
    tasks: Sequence[PlannedTask],
    samples: Mapping[SampleKey, SampleRecord],
    plain: Mapping[SampleKey, PlainRecord],
    *,
    seed: int,
    greedy: bool,
    published: Mapping[str, float],
) -> Results:
    """Figures of planned tasks, all of whose samples are decoded.

    Args:
        tasks: The plan.
        samples: Speculative records.
        plain: Plain records; none if the speedup was not measured.
        seed: Of the bootstrap.
        greedy: Whether both sides' outputs must be equal.
        published: τ by task.
    """

    def figures(chosen: Iterable[PlannedTask], beside: float | None = None) -> Figures:
        chosen = list(chosen)
        keys = [sample.key for task in chosen for sample in task.samples]
        found = summarize_samples(
            [samples[key] for key in keys], [plain[key] for key in keys if key in plain], seed=seed, greedy=greedy
        )
        skipped = sum(task.num_skipped for task in chosen)
        return found.model_copy(update={"skipped": skipped, "published": beside})

    domains = [domain for domain in DOMAINS if any(task.domain == domain for task in tasks)]
    return Results(
        tasks={task.name: figures([task], published.get(task.name)) for task in tasks},
        domains={name: figures(task for task in tasks if task.domain == name) for name in domains},
        overall=figures(tasks),
    )


def summarize_samples(
    samples: Sequence[SampleRecord], plain: Sequence[PlainRecord], *, seed: int, greedy: bool
) -> Figures:
    """Figures of a group of samples.

    Args:
        samples: At least one.
        plain: The target's own decoding of them, as far as it was measured; counts for those of `samples` only.
        seed: Of the bootstrap.
        greedy: Whether both sides' outputs must be equal.
    """
    accepted = [record.accepted_lengths for record in samples]
    proposed = [record.proposal_lengths for record in samples]
    kept = [record.accepted_draft_lengths for record in samples]
    has_rounds = any(accepted)
    own = {record.key: record for record in plain}
    measured = [record for record in samples if record.key in own]
    spent = total(record.timing for record in samples)
    return Figures(
        accepted_length=metrics.accepted_length(accepted) if has_rounds else None,
        interval=metrics.bootstrap_interval(accepted, seed=seed) if has_rounds else None,
        accept_rate=tuple(metrics.accept_rate(kept, proposed)),
        cond_accept_rate=tuple(metrics.cond_accept_rate(kept, proposed)),
        draft_tokens_per_proposal=metrics.draft_tokens_per_proposal(proposed) if has_rounds else None,
        verify_rate=metrics.verify_rate(accepted, proposed) if has_rounds else None,
        speedup=_speedup(measured, [own[record.key] for record in measured]),
        samples=len(samples),
        rounds=sum(map(len, accepted)),
        new_tokens=spent.num_tokens,
        differing=_differing(measured, own) if greedy and measured else None,
        divergences=tuple(found for record in measured if (found := own[record.key].divergence)),
        speculative=spent,
        plain=total(own[record.key].timing for record in measured) if measured else None,
    )


def _speedup(samples: Sequence[SampleRecord], plain: Sequence[PlainRecord]) -> float | None:
    """Seconds a token without the drafter / with it, both over the same samples."""
    ours, own = total(record.timing for record in samples), total(record.timing for record in plain)
    if not (ours.num_tokens and own.num_tokens and ours.total_s):
        return None
    return own.token_s / ours.token_s


def _differing(samples: Sequence[SampleRecord], own: Mapping[SampleKey, PlainRecord]) -> int:
    return sum(record.output_hash != own[record.key].output_hash for record in samples)
