"""The pictures of a comparison as PNG files. No torch.

Each drafter has one colour and one marker in all of them, told apart by everyone, whatever colours they see.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from evaluation.compare.comparison import Comparison, Group, Standing
from evaluation.timing import PHASES, Timing
from services.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ACCEPTANCE_PNG = "acceptance.png"
LENGTHS_PNG = "accepted_length.png"
TIMES_PNG = "times.png"

DOTS_PER_INCH = 150
PANEL_INCHES = 3.6
MOST_COLUMNS = 3
ROW_INCHES = 0.42

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
PHASE_COLOURS = ("#999999", "#e69f00", "#0072b2", "#cccccc")
PHASE_NAMES = ("prefill", "draft", "verify", "overhead")

ENOUGH_ROUNDS = 30
"""A rate of fewer rounds is drawn hollow: its standard error may exceed 0.09."""


def draw_all(comparison: Comparison, folder: Path) -> list[str]:
    """Draw the pictures of a comparison.

    Args:
        comparison: Any number of drafters.
        folder: Exists; earlier pictures are replaced.

    Returns:
        Their file names.
    """
    figures = {
        ACCEPTANCE_PNG: _acceptance(comparison),
        LENGTHS_PNG: _accepted_lengths(comparison),
        TIMES_PNG: _times(comparison),
    }
    for name, figure in figures.items():
        with replacing(folder / name) as new:
            figure.savefig(new, dpi=DOTS_PER_INCH, format="png")
    return list(figures)


def _figure(width_inches: float, height_inches: float) -> Figure:
    # Without pyplot: no window system, no state that a second drawing would share.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width_inches, height_inches), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _acceptance(comparison: Comparison) -> Figure:
    """Conditional acceptance by position: a panel over all samples, and one a domain where there are several."""
    from matplotlib.ticker import MaxNLocator

    domains = list(dict.fromkeys(comparison.domains.values()))
    panels: list[Group] = [("all", "all")]
    if len(domains) > 1:
        panels += [("domain", name) for name in domains]
    columns = len(panels) if len(panels) <= MOST_COLUMNS else 2
    rows = math.ceil(len(panels) / columns)
    figure = _figure(max(1.5, columns) * PANEL_INCHES, rows * PANEL_INCHES * 0.8 + 0.7)
    axes: list[Axes] = figure.subplots(rows, columns, squeeze=False, sharey=True, sharex=True).flatten().tolist()
    for panel, group in zip(axes, panels, strict=False):
        for place, standing in enumerate(comparison.standings):
            _draw_acceptance(panel, standing, group, place)
        panel.set_title("all samples" if group[0] == "all" else group[1], fontsize=10)
        panel.set_ylim(-0.03, 1.03)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.grid(color="0.92")
        panel.set_axisbelow(True)
        panel.tick_params(labelbottom=True, labelsize=9)
    for panel in axes[len(panels) :]:
        panel.set_visible(False)
    figure.supxlabel(f"position in the draft (hollow: fewer than {ENOUGH_ROUNDS} rounds got there)", fontsize=9)
    figure.supylabel("accepted, given all before are", fontsize=9)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    return figure


def _draw_acceptance(panel: Axes, standing: Standing, group: Group, place: int) -> None:
    rates = standing.figures(group).cond_accept_rate
    reached = standing.reached[group[1]]
    points = [(k + 1, rate, reached[k]) for k, rate in enumerate(rates) if rate is not None]
    colour, marker = _style(place)
    solid = [(k, rate) for k, rate, count in points if count >= ENOUGH_ROUNDS]
    panel.plot([k for k, _ in solid], [rate for _, rate in solid], color=colour, linewidth=1.5)
    panel.plot(
        [k for k, _, _ in points],
        [rate for _, rate, _ in points],
        color=colour,
        linewidth=0.8,
        linestyle=":",
        alpha=0.8,
    )
    panel.plot([], [], color=colour, marker=marker, markersize=5, linewidth=1.3, label=standing.label)
    for is_filled in (True, False):
        chosen = [(k, rate) for k, rate, count in points if (count >= ENOUGH_ROUNDS) == is_filled]
        panel.plot(
            [k for k, _ in chosen],
            [rate for _, rate in chosen],
            color=colour,
            marker=marker,
            markersize=5,
            linestyle="none",
            markerfacecolor=colour if is_filled else "white",
        )


def _accepted_lengths(comparison: Comparison) -> Figure:
    """τ with its interval, a row for each group of samples."""
    shown = comparison.shown_groups
    count = len(comparison.standings)
    figure = _figure(1.9 * PANEL_INCHES, ROW_INCHES * len(shown) * max(1.0, count / 2.5) + 1.3)
    panel: Axes = figure.subplots()
    for place, standing in enumerate(comparison.standings):
        colour, marker = _style(place)
        offset = 0.6 * ((place + 0.5) / count - 0.5)
        panel.plot([], [], color=colour, marker=marker, markersize=5, linewidth=1.3, label=standing.label)
        for row, group in enumerate(shown):
            found = standing.figures(group)
            if found.accepted_length is None or found.interval is None:
                continue
            panel.plot(found.interval, [row + offset] * 2, color=colour, linewidth=1.5)
            panel.plot([found.accepted_length], [row + offset], color=colour, marker=marker, markersize=5)
    panel.set_yticks(range(len(shown)), [_row_name(group) for group in shown], fontsize=9)
    panel.set_ylim(len(shown) - 0.5, -0.5)
    panel.set_xlabel("accepted length τ, 95 % intervals", fontsize=9)
    panel.grid(axis="x", color="0.92")
    panel.set_axisbelow(True)
    _legend(figure, panel)
    return figure


def _times(comparison: Comparison) -> Figure:
    """Where the time of a token goes, with each drafter and without one."""
    rows = [(standing.label, standing.results.overall.speculative) for standing in comparison.standings]
    plain = comparison.standings[0].results.overall.plain
    if plain is not None:
        rows.append(("no drafter", plain))
    figure = _figure(1.9 * PANEL_INCHES, ROW_INCHES * len(rows) + 1.3)
    panel: Axes = figure.subplots()
    for phase, name, colour in zip(PHASES, PHASE_NAMES, PHASE_COLOURS, strict=True):
        widths = [1000 * _each(getattr(timing, phase), timing) for _, timing in rows]
        before = [
            sum(1000 * _each(getattr(timing, other), timing) for other in PHASES[: PHASES.index(phase)])
            for _, timing in rows
        ]
        panel.barh(range(len(rows)), widths, left=before, height=0.6, color=colour, label=name)
    panel.set_yticks(range(len(rows)), [label for label, _ in rows], fontsize=9)
    panel.set_ylim(len(rows) - 0.5, -0.5)
    panel.set_xlabel("milliseconds a new token", fontsize=9)
    _legend(figure, panel)
    return figure


def _legend(figure: Figure, panel: Axes) -> None:
    handles, labels = panel.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False, fontsize=9)


def _each(spent_s: float, timing: Timing) -> float:
    return spent_s / timing.num_tokens if timing.num_tokens else 0.0


def _row_name(group: Group) -> str:
    kind, name = group
    return name if kind == "task" else f"{name}, all" if kind == "domain" else "all samples"


def _style(place: int) -> tuple[str, str]:
    return COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)]
