"""What the streamed features are worth: the same run with and without their order.

The control run is the demo with `drafter.permute_context=true`: every anchor sees the same features as before, but at
random positions, in training and in drafting alike. What it still reaches it owes to the anchor token, to the Markov
head and to features as a bag; the gap to the real run is what the target's context contributes.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from evaluation.bench.hardware import describe_hardware
from services.errors import SlipstreamError

NUM_SAMPLES = 160
"""Held-out prompts to decode unless the overrides say otherwise: with 48 the intervals are ±12 % and just touch."""


class FeatureWorth(NamedTuple):
    """Result of the benchmark."""

    ordered: dict[str, Any]
    """Summary of the run with features in place (the JSON of `slipstream demo --json`)."""
    permuted: dict[str, Any]
    """Summary of the control run."""

    @property
    def intervals_apart(self) -> bool:
        """Whether the 95 % intervals of the two τ do not touch."""
        low: float = self.ordered["accepted_length_end_interval"][0]
        high: float = self.permuted["accepted_length_end_interval"][1]
        return low > high

    @property
    def ratio(self) -> float:
        """τ with features in place, over τ with permuted features."""
        ordered: float = self.ordered["accepted_length_end"]
        permuted: float = self.permuted["accepted_length_end"]
        return ordered / permuted

    def as_json(self) -> dict[str, Any]:
        """One object for scripts."""
        return {
            "ordered": self.ordered,
            "permuted": self.permuted,
            "ratio": self.ratio,
            "intervals_apart": self.intervals_apart,
            "hardware": describe_hardware(),
        }


def run_demo(output_dir: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """One run of the demo in a process of its own; if this one is interrupted, it stops in order.

    Raises:
        SlipstreamError: It failed; why stands on stderr.
    """
    where = ["--output-dir", str(output_dir)]
    command = [sys.executable, "-m", "trainer", "demo", "--json", "--no-dashboard", *where, *overrides]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            output, _ = process.communicate()
        except BaseException:
            process.terminate()
            raise
    if process.returncode:
        raise SlipstreamError(f"{shlex.join(command)} ended with exit code {process.returncode}")
    summary: dict[str, Any] = json.loads(output)
    return summary


def measure_feature_worth(
    overrides: Sequence[str],
    say: Callable[[str], None],
    run: Callable[[Path, Sequence[str]], dict[str, Any]] = run_demo,
) -> FeatureWorth:
    """Run the demo twice, one run after the other, with the same seeds and steps.

    Args:
        overrides: `section.key=value` settings for both runs.
        say: Where progress goes.
        run: Makes one run: output directory and overrides in, the JSON of `slipstream demo --json` out.

    Raises:
        SlipstreamError: One of the runs failed, or measured nothing.
    """
    overrides = [f"evaluation.max_samples={NUM_SAMPLES}", *overrides]
    with tempfile.TemporaryDirectory(prefix="slipstream-bench-") as folder:
        say("run 1 of 2: features in place")
        ordered = run(Path(folder) / "ordered", overrides)
        say("run 2 of 2: features at permuted positions")
        permuted = run(Path(folder) / "permuted", [*overrides, "drafter.permute_context=true"])
    if ordered["accepted_length_end"] is None or permuted["accepted_length_end"] is None:
        raise SlipstreamError("a run without evaluation has no τ to compare: leave evaluation.max_samples above 0")
    return FeatureWorth(ordered, permuted)
