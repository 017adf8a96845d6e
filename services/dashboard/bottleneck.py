"""Who holds the run up, in words, and what to do about it. Pure.

Features flow target → buffer → trainer. A trainer that never waits is itself the bottleneck. One that waits while the
buffer is nearly empty waits for the targets; one that waits beside a filled buffer waits for the way between them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

WAITS = 0.1
"""A trainer that waits for a smaller part of its time is busy."""

LOW_FILL = 0.3
"""Up to here the buffer counts as nearly empty: what is in it is under way or already leased."""

HIGH_FILL = 0.8
"""From here the targets are held back: a sample only goes in when another one goes out."""


@dataclass(frozen=True)
class Load:
    """How busy the parts are, over the last seconds.

    Attributes:
        run: What `slipstream scale` takes to name the run.
        wait_fraction: Part of its time that the trainer waits for features; None before its first step.
        fill: Resident bytes over capacity.
        capture_tokens_per_s: Of all targets together.
        train_tokens_per_s: Of all ranks together.
        num_serving: Targets that answer.
        num_targets: Targets there should be.
        missing: Why one of the others does not serve, if it says so.
        autoscaling: Between how many targets the run scales them by itself; empty if it does not.
    """

    run: str
    wait_fraction: float | None
    fill: float
    capture_tokens_per_s: float
    train_tokens_per_s: float
    num_serving: int
    num_targets: int
    missing: str = ""
    autoscaling: str = ""


@dataclass(frozen=True)
class Verdict:
    """Attributes:
    who: The part that sets the pace; None while nobody does.
    text: What is the case.
    advice: What to do, empty if nothing needs doing.
    command: Which command does it, if one does.
    """

    who: Literal["capture", "stream", "train"] | None
    text: str
    advice: str = ""
    command: str = ""


def find_bottleneck(load: Load) -> Verdict:
    """Say who sets the pace."""
    wait = load.wait_fraction
    if load.num_targets and not load.num_serving:
        return Verdict("capture", "No target serves, so nothing is captured.", load.missing)
    if wait is None:
        return Verdict(None, "The buffer is being filled; the trainer has not finished a step yet.")
    waits = f"The trainer waits {_percent(wait)} of its time"
    if wait < WAITS:
        return _train(load, "The trainer is always busy" if wait < 0.005 else waits)
    if load.fill > LOW_FILL:
        return Verdict(
            "stream",
            f"{waits} although the buffer is {_percent(load.fill)} full: the way from there to the trainer is the "
            "bottleneck.",
            "Features are there and do not arrive in time: put the replay buffer's Redis beside the trainer, or give "
            "the trainer's machine more cores for fetching and decoding.",
        )
    if load.num_serving < load.num_targets:
        return Verdict(
            "capture",
            f"{waits} and the buffer is {_nearly_empty(load.fill)}: capture is the bottleneck, and only "
            f"{load.num_serving} of {load.num_targets} targets serve.",
            load.missing or "The other targets are loading or restarting.",
        )
    if load.autoscaling:
        return Verdict(
            "capture",
            f"{waits} and the buffer is {_nearly_empty(load.fill)}: capture is the bottleneck.",
            f"The run asks for more targets by itself ({load.autoscaling}); its events say why it did, or did not.",
        )
    wanted = max(load.num_targets + 1, min(2 * load.num_targets, round(load.num_targets / (1 - min(wait, 0.99)))))
    return Verdict(
        "capture",
        f"{waits} and the buffer is {_nearly_empty(load.fill)}: capture is the bottleneck.",
        "Add targets:",
        f"slipstream scale {load.run} targets={wanted}",
    )


def _train(load: Load, waits: str) -> Verdict:
    if load.fill < HIGH_FILL:
        return Verdict("train", f"{waits} and capture keeps up: training sets the pace, as it should.")
    text = (
        f"{waits} and the buffer is {_percent(load.fill)} full: training is the bottleneck, the targets wait for room."
    )
    if load.autoscaling:
        return Verdict(
            "train",
            text,
            f"To go faster give the trainer more ranks. The run ends spare targets by itself ({load.autoscaling}).",
        )
    if load.num_targets > 1:
        return Verdict(
            "train",
            text,
            "To go faster give the trainer more ranks; or do with fewer targets:",
            f"slipstream scale {load.run} targets={load.num_targets - 1}",
        )
    return Verdict("train", text, "That is the best use of a trainer. To go faster give it more ranks.")


def _nearly_empty(fill: float) -> str:
    return "empty" if fill < 0.005 else f"{'nearly empty' if fill < 0.1 else 'low'} ({_percent(fill)})"


def _percent(part: float) -> str:
    return f"{100 * part:.0f}\N{NO-BREAK SPACE}%"
