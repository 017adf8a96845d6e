"""The figures of a comparison, from its records (docs/compare.md). No torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations
from typing import Any, Literal

from evaluation.compare.entrants import Match, Parameters, labelled
from evaluation.compare.match import Decoded
from evaluation.compare.paired import PairedDifference, paired_difference
from evaluation.outputs import groups
from evaluation.records import SampleRecord
from evaluation.results import Figures, Results, collect_results
from evaluation.session import closing_warnings
from evaluation.tasks import DOMAINS
from services.contracts import Record

FEW_PROMPTS = 20
"""With fewer, bootstrap intervals are narrower than they should be."""

Group = tuple[Literal["task", "domain", "all"], str]
"""Kind and name of a group of samples."""


class DraftCost(Record):
    """What drafting takes.

    Attributes:
        round_s: Seconds of the drafter a round of a sample: its part of what the batch took. Building the drafter's
            cache counts.
        share: Part of the whole time of decoding.
    """

    round_s: float | None
    share: float | None


class Standing(Record):
    """What one drafter reached.

    Attributes:
        label: Names it.
        drafter: Its folder.
        digest: Of its config and weights.
        algorithm: dspark, dflash or eagle3.
        parameters: Its size.
        results: Its figures.
        draft_cost: By kind of group and name.
        reached: Rounds that got as far as position k with all earlier drafts accepted, by domain and over all: what
            cond_accept_rate@k is of.
    """

    label: str
    drafter: str
    digest: str
    algorithm: str
    parameters: Parameters
    results: Results
    draft_cost: dict[str, dict[str, DraftCost]]
    reached: dict[str, tuple[int, ...]]

    def figures(self, group: Group) -> Figures:
        """Of a group of samples."""
        return {(kind, name): found for kind, name, found in groups(self.results)}[group]

    def cost(self, group: Group) -> DraftCost:
        """Of drafting a group of samples."""
        kind, name = group
        return self.draft_cost[kind][name]


class Difference(Record):
    """τ of one drafter minus τ of another, on one group of samples."""

    first: str
    second: str
    kind: Literal["task", "domain", "all"]
    name: str
    paired: PairedDifference | None
    """None where no prompt has rounds of both."""


class Comparison(Record):
    """All figures, and what they are of.

    Attributes:
        target: Folder or hub name.
        target_fingerprint: Of its config.
        settings: What all drafters had in common, as JSON values.
        domains: Of each task.
        standings: One a drafter, in the order given.
        differences: Of each pair and group.
        warnings: What whoever reads the figures must know.
        provenance: Command, versions and machine.
        hardware: What times are measured on.
    """

    target: str
    target_fingerprint: str
    settings: dict[str, Any]
    domains: dict[str, str]
    standings: tuple[Standing, ...]
    differences: tuple[Difference, ...]
    warnings: tuple[str, ...]
    provenance: dict[str, Any]
    hardware: str

    @property
    def labels(self) -> list[str]:
        """Of the drafters."""
        return [standing.label for standing in self.standings]

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """All two drafters."""
        return list(combinations(self.labels, 2))

    @property
    def shown_groups(self) -> list[Group]:
        """Groups of samples without those that repeat another one: a domain of one task, all of one task."""
        return list(shown_groups(self.standings[0].results, self.domains))

    def difference(self, pair: tuple[str, str], group: Group) -> PairedDifference | None:
        """Of a pair and group."""
        return next(
            found.paired
            for found in self.differences
            if (found.first, found.second) == pair and (found.kind, found.name) == group
        )


def compare(match: Match, decoded: Decoded, provenance: dict[str, Any], hardware: str) -> Comparison:
    """Sum up a comparison, all of whose samples are decoded.

    Args:
        match: What was decoded.
        decoded: The records.
        provenance: Command, versions and machine.
        hardware: What it was decoded on.
    """
    results = [
        collect_results(
            match.tasks,
            samples,
            decoded.plain,
            seed=match.settings.seed,
            greedy=match.session.is_greedy,
            published=entrant.session.published,
        )
        for entrant, samples in zip(match.entrants, decoded.samples, strict=True)
    ]
    standings = tuple(
        Standing(
            label=entrant.label,
            drafter=entrant.session.settings.drafter,
            digest=entrant.session.identity["drafter_digest"],
            algorithm=entrant.session.algorithm,
            parameters=entrant.parameters,
            results=found,
            draft_cost=_draft_costs(found),
            reached=_reached_by_domain(match, list(samples.values())),
        )
        for entrant, samples, found in zip(match.entrants, decoded.samples, results, strict=True)
    )
    warnings = {
        entrant.label: closing_warnings(entrant.session, found)
        for entrant, found in zip(match.entrants, results, strict=True)
    }
    return Comparison(
        target=match.settings.target,
        target_fingerprint=match.session.identity["target_fingerprint"],
        settings=match.plain_identity,
        domains={task.name: task.domain for task in match.tasks},
        standings=standings,
        differences=tuple(_differences(match, decoded, results[0])),
        warnings=(*labelled(warnings), *_few_prompts(match)),
        provenance=provenance,
        hardware=hardware,
    )


def shown_groups(results: Results, domains: dict[str, str]) -> Iterator[Group]:
    """Tasks domain by domain, each followed by its domain where that has several, then all where there are several."""
    for domain in DOMAINS:
        tasks = [name for name in results.tasks if domains[name] == domain]
        yield from (("task", name) for name in tasks)
        if len(tasks) > 1 and len(results.domains) > 1:
            yield "domain", domain
    if len(results.tasks) > 1:
        yield "all", "all"


def reached_counts(samples: Iterable[SampleRecord]) -> tuple[int, ...]:
    """Rounds whose proposal has a draft at position k and whose earlier drafts were all accepted."""
    rounds = [
        (kept, length)
        for record in samples
        for kept, length in zip(record.accepted_draft_lengths, record.proposal_lengths, strict=True)
    ]
    longest = max((length for _, length in rounds), default=0)
    return tuple(sum(length > k and kept >= k for kept, length in rounds) for k in range(longest))


def _draft_costs(results: Results) -> dict[str, dict[str, DraftCost]]:
    costs: dict[str, dict[str, DraftCost]] = {}
    for kind, name, figures in groups(results):
        spent = figures.speculative
        costs.setdefault(kind, {})[name] = DraftCost(
            round_s=spent.draft_s / figures.rounds if figures.rounds else None,
            share=spent.draft_s / spent.total_s if spent.total_s else None,
        )
    return costs


def _reached_by_domain(match: Match, samples: Sequence[SampleRecord]) -> dict[str, tuple[int, ...]]:
    domains = dict.fromkeys(task.domain for task in match.tasks)
    found = {domain: reached_counts(record for record in samples if record.domain == domain) for domain in domains}
    return found | {"all": reached_counts(samples)}


def _differences(match: Match, decoded: Decoded, results: Results) -> Iterator[Difference]:
    domains = {task.name: task.domain for task in match.tasks}
    sides = list(zip((entrant.label for entrant in match.entrants), decoded.samples, strict=True))
    for (first, ours), (second, theirs) in combinations(sides, 2):
        for kind, name, _ in groups(results):
            chosen = [task for task in domains if kind == "all" or name == (task if kind == "task" else domains[task])]
            keys = [key for key in ours if key[0] in chosen]
            lengths = [[side[key].accepted_lengths for key in keys] for side in (ours, theirs)]
            has_rounds = any(a and b for a, b in zip(*lengths, strict=True))
            yield Difference(
                first=first,
                second=second,
                kind=kind,
                name=name,
                paired=paired_difference(*lengths, seed=match.settings.seed) if has_rounds else None,
            )


def _few_prompts(match: Match) -> list[str]:
    few = [f"{task.name} {len(task.samples)}" for task in match.tasks if len(task.samples) < FEW_PROMPTS]
    if not few:
        return []
    return [
        f"fewer than {FEW_PROMPTS} prompts ({', '.join(few)}): intervals of so few are narrower than they should be; "
        "decode more to tell drafters apart"
    ]
