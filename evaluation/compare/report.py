"""A comparison as a Markdown page with pictures beside it. No torch."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path

from evaluation.compare.comparison import Comparison, Group, Standing
from evaluation.compare.paired import PairedDifference
from evaluation.compare.plots import ACCEPTANCE_PNG, ENOUGH_ROUNDS, LENGTHS_PNG, TIMES_PNG
from evaluation.results import Figures
from services.files import replace_text

REPORT = "report.md"
NOTHING = "–"


def markdown(comparison: Comparison) -> str:
    """The page; its pictures are those of `evaluation.compare.plots`, in the same folder."""
    parts = [
        f"# {' against '.join(comparison.labels)}",
        f"Drafters for `{comparison.target}` on the same prompts with the same seeds, {_temperature(comparison)}.",
        verdict(comparison),
        *[f"> **Mind:** {warning}" for warning in comparison.warnings],
        "## Drafters",
        _drafters(comparison),
        "## Accepted length",
        "τ: tokens that a round commits, the bonus token included; 95 % bootstrap intervals over prompts.",
        _lengths(comparison),
        f"![Accepted length of each drafter by task]({LENGTHS_PNG})",
        "## Differences, pair by pair",
        "τ of the first minus τ of the second on the same resampled prompts, and its 95 % interval. Bold: the interval "
        "leaves out 0. One difference in twenty does so by chance.",
        _differences(comparison),
        "## Acceptance by position",
        "How often the draft at a position is accepted, given that all before it are.",
        f"![Conditional acceptance by position in the draft]({ACCEPTANCE_PNG})",
        "Over all samples: *conditional* (of so many rounds that got there) · *prefix*, the part of the rounds with a "
        f"draft at the position that accepted it. A rate of fewer than {ENOUGH_ROUNDS} rounds says little.",
        _acceptance(comparison),
        "## Cost and speed",
        "Drafting is timed for each sample as its part of the batch, the drafter's cache over the prompt included. The "
        "speedup is wall time a token without a drafter / with it, both measured in this comparison.",
        _costs(comparison),
        f"![Where the time of a token goes]({TIMES_PNG})",
        *_speedups(comparison),
        "## How it was measured",
        _method(comparison),
    ]
    return "\n\n".join(parts) + "\n"


def verdict(comparison: Comparison) -> str:
    """Over all samples: which drafter has the longest τ, and which others these prompts do not tell it apart from."""
    group = comparison.shown_groups[-1]
    lengths = {
        standing.label: length
        for standing in comparison.standings
        if (length := standing.figures(group).accepted_length) is not None
    }
    if not lengths:
        return "Every sample ended at its first token, so there is no accepted length."
    best = max(lengths, key=lambda label: lengths[label])
    pairs = {
        (set(pair) - {best}).pop(): comparison.difference(pair, group) for pair in comparison.pairs if best in pair
    }
    clear = [label for label, found in pairs.items() if found is not None and found.is_clear]
    open_ = [label for label in pairs if label not in clear]
    text = f"**{best}** has the longest τ over all samples, {lengths[best]:.2f}"
    if clear:
        text += f"; its lead over {_and(clear)} has a paired 95 % interval above 0"
    if open_:
        text += f"; these prompts do not tell it apart from {_and(open_)}"
    return text + "."


def group_name(group: Group) -> str:
    """As it stands in tables."""
    kind, name = group
    return name if kind == "task" else f"{name}, all" if kind == "domain" else "all samples"


def with_interval(figures: Figures) -> str:
    """τ and its interval."""
    if figures.accepted_length is None or figures.interval is None:
        return NOTHING
    low, high = figures.interval
    return f"{figures.accepted_length:.2f} ({low:.2f} – {high:.2f})"


def difference_text(found: PairedDifference | None) -> str:
    """A difference and its interval."""
    if found is None:
        return NOTHING
    return f"{found.difference:+.2f} ({found.low:+.2f} – {found.high:+.2f})".replace("-", "−")


def number(value: float | None, digits: int = 2, unit: str = "") -> str:
    """A figure, or a dash where there is none."""
    return NOTHING if value is None else f"{value:.{digits}f}{unit}"


def percent(value: float | None) -> str:
    """A part of a whole."""
    return NOTHING if value is None else f"{value:.0%}"


def millions(count: int) -> str:
    """A number of parameters."""
    return f"{count / 1e6:,.2f} M" if count < 1e8 else f"{count / 1e6:,.0f} M"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], num_words: int = 1) -> str:
    """A Markdown table whose first columns are words and whose others are figures."""
    lines = [head, [*["---"] * num_words, *["---:"] * (len(head) - num_words)], *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _drafters(comparison: Comparison) -> str:
    head = ["drafter", "algorithm", "folder", "drafts a round", "own parameters", "with the target's tables"]
    rows = (
        [
            standing.label,
            standing.algorithm,
            f"`{standing.drafter}` ({standing.digest})",
            number(standing.results.overall.draft_tokens_per_proposal),
            millions(standing.parameters.own),
            millions(standing.parameters.in_all),
        ]
        for standing in comparison.standings
    )
    return table(head, rows, num_words=3)


def _lengths(comparison: Comparison) -> str:
    published = {
        standing.label: standing.results.tasks
        for standing in comparison.standings
        if any(figures.published is not None for figures in standing.results.tasks.values())
    }
    head = ["", "samples", *comparison.labels, *(f"{label}, published" for label in published)]
    rows = []
    for group in comparison.shown_groups:
        found = [standing.figures(group) for standing in comparison.standings]
        row = [group_name(group), str(found[0].samples), *map(with_interval, found)]
        row += [number(tasks[group[1]].published if group[0] == "task" else None) for tasks in published.values()]
        rows.append(row)
    return table(head, rows)


def _differences(comparison: Comparison) -> str:
    def cell(found: PairedDifference | None) -> str:
        text = difference_text(found)
        return f"**{text}**" if found is not None and found.is_clear else text

    head = ["", *(f"{first} − {second}" for first, second in comparison.pairs)]
    return table(
        head,
        (
            [group_name(group), *(cell(comparison.difference(pair, group)) for pair in comparison.pairs)]
            for group in comparison.shown_groups
        ),
    )


def _acceptance(comparison: Comparison) -> str:
    overall = [standing.results.overall for standing in comparison.standings]
    longest = max(len(figures.accept_rate) for figures in overall)

    def cell(standing: Standing, k: int) -> str:
        figures = standing.results.overall
        if k >= len(figures.accept_rate):
            return NOTHING
        given = figures.cond_accept_rate[k]
        return f"{number(given)} (of {standing.reached['all'][k]}) · {figures.accept_rate[k]:.2f}"

    return table(
        ["position", *comparison.labels],
        ([str(k + 1), *(cell(standing, k) for standing in comparison.standings)] for k in range(longest)),
    )


def _costs(comparison: Comparison) -> str:
    head = ["drafter", "drafting, ms a round", "share of the time", "verifying", "tokens a second", "speedup"]
    rows = []
    for standing in comparison.standings:
        figures = standing.results.overall
        cost = standing.cost(("all", "all"))
        spent = figures.speculative
        rows.append(
            [
                standing.label,
                number(None if cost.round_s is None else 1000 * cost.round_s),
                percent(cost.share),
                percent(spent.verify_s / spent.total_s if spent.total_s else None),
                number(spent.num_tokens / spent.total_s if spent.total_s else None, 1),
                number(figures.speedup, unit="×"),
            ]
        )
    plain = comparison.standings[0].results.overall.plain
    if plain is not None and plain.total_s:
        rows.append(
            [
                "no drafter", NOTHING, NOTHING, percent(plain.verify_s / plain.total_s),
                number(plain.num_tokens / plain.total_s, 1), "1.00×",
            ]
        )  # fmt: skip
    return table(head, rows)


def _speedups(comparison: Comparison) -> list[str]:
    if not comparison.settings["measure_speedup"] or len(comparison.shown_groups) < 2:
        return []
    head = ["speedup", *comparison.labels]
    rows = (
        [
            group_name(group),
            *(number(standing.figures(group).speedup, unit="×") for standing in comparison.standings),
        ]
        for group in comparison.shown_groups
    )
    return [table(head, rows)]


def _method(comparison: Comparison) -> str:
    settings, provenance = comparison.settings, comparison.provenance
    packages = ", ".join(f"{name} {version}" for name, version in sorted(provenance.get("packages", {}).items()))
    lines = [
        f"target: `{comparison.target}`, fingerprint `{comparison.target_fingerprint}`",
        f"decoding: {_temperature(comparison)}, up to {settings['max_new_tokens']} new tokens, batches of "
        f"{settings['batch_size']}, {settings['dtype']} on {settings['device']}, "
        f"{'thinking' if settings['enable_thinking'] else 'non-thinking'} prompts, seed {settings['seed']} + index of "
        "the sample",
        f"hardware: {comparison.hardware}",
        f"versions: {packages}; Python {provenance.get('python')}, {provenance.get('platform')}",
        f"code: {provenance.get('git_sha') or 'an installed package'}",
    ]
    command = shlex.join(provenance.get("command", []))
    return "\n".join(f"- {line}" for line in lines) + f"\n\n```console\n$ {command}\n```"


def _temperature(comparison: Comparison) -> str:
    temperature = comparison.settings["temperature"]
    return "greedy" if temperature == 0 else f"temperature {temperature:g}"


def _and(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def write_report(comparison: Comparison, folder: Path) -> Path:
    """Write the page; its pictures are drawn by `evaluation.compare.plots.draw_all`."""
    path = folder / REPORT
    replace_text(path, markdown(comparison))
    return path
