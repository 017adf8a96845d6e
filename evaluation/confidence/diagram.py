"""Reliability diagrams as one PNG file, a panel for each position of a draft. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from evaluation.confidence.calibration import ECE_BINS, SlotCalibration
from services.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PANELS_A_ROW = 4
PANEL_INCHES = 2.9
DOTS_PER_INCH = 150

HEAD, CALIBRATED = "#d95f02", "#1b73b4"
"""Told apart by everyone, whatever colours they see."""


def write_diagrams(
    path: Path, head: Sequence[SlotCalibration], calibrated: Sequence[SlotCalibration], title: str
) -> None:
    """Draw predicted against observed survival, bin by bin, and how many predictions each bin has.

    Args:
        path: A PNG file; its folder exists.
        head: Figures of the head's own confidences, at least one position.
        calibrated: Figures of the same positions after temperature scaling.
        title: Stands above all.
    """
    # Without pyplot: no window system, no state that a second drawing would share.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    num_rows = math.ceil(len(head) / PANELS_A_ROW)
    num_columns = math.ceil(len(head) / num_rows)
    size = (max(2, num_columns) * PANEL_INCHES, num_rows * PANEL_INCHES + 0.9)
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(num_rows, num_columns, squeeze=False, sharex=True, sharey=True).flatten().tolist()
    for place, (before, after) in enumerate(zip(head, calibrated, strict=True)):
        _draw(panels[place], before, after)
        if place + num_columns >= len(head):
            panels[place].tick_params(labelbottom=True)
            panels[place].set_xlabel("predicted survival", fontsize=9)
    for panel in panels[len(head) :]:
        panel.set_visible(False)
    figure.suptitle(title, fontsize=11)
    figure.supylabel("part that survived", fontsize=9)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, 2 * num_columns), frameon=False, fontsize=9)
    with replacing(path) as new:
        figure.savefig(new, dpi=DOTS_PER_INCH, format="png")


def _draw(panel: Axes, before: SlotCalibration, after: SlotCalibration) -> None:
    panel.set_title(f"draft {before.position + 1} · ECE {before.ece:.1%} → {after.ece:.1%}", fontsize=9)
    panel.plot([0, 1], [0, 1], color="0.6", linewidth=1, linestyle="--", label="calibrated perfectly")
    edges = [number / ECE_BINS for number in range(ECE_BINS)]
    shares = [found.count / after.num_rounds if found else 0.0 for found in after.bins]
    panel.bar(
        edges, shares, width=1 / ECE_BINS, align="edge", color=CALIBRATED, alpha=0.2, label="share of the predictions"
    )
    for slot, colour, marker, filled, label in (
        (before, HEAD, "o", False, "head as trained"),
        (after, CALIBRATED, "s", True, "after temperature scaling"),
    ):
        found = [entry for entry in slot.bins if entry]
        predicted, observed = [entry.predicted for entry in found], [entry.observed for entry in found]
        # Rings around squares: both are seen where they coincide.
        areas = [(6 if filled else 24) + 60 * entry.count / slot.num_rounds for entry in found]
        panel.plot(predicted, observed, color=colour, linewidth=0.8, alpha=0.5)
        panel.scatter(
            predicted,
            observed,
            areas,
            marker=marker,
            facecolors=colour if filled else "none",
            edgecolors=colour,
            linewidths=0.0 if filled else 1.2,
            label=label,
        )
    panel.set_xlim(0, 1)
    panel.set_ylim(0, 1)
    panel.set_aspect("equal")
    panel.tick_params(labelsize=8)
    panel.grid(color="0.92")
    panel.set_axisbelow(True)
