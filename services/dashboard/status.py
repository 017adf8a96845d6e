"""How a run stands right now: the numbers, the words, and whether it can be steered. Pure."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, Literal

from services.dashboard.bottleneck import Load, find_bottleneck
from services.dashboard.history import History

State = Literal["empty", "starting", "running", "paused", "stopping", "finished", "stopped", "failed", "silent"]


def run_status(history: History, now_s: float, *, name: str, silent_after_s: float) -> dict[str, Any]:
    """Everything that the page shows beside the charts.

    Args:
        history: Of the run.
        now_s: Wall clock.
        name: What to call the run if its history does not say.
        silent_after_s: How old the newest record of a living run can be; 0 if its driver is known to be gone.
    """
    run, figures = history.run or {}, history.figures or {}
    state = _state(history, now_s, silent_after_s)
    targets = figures.get("targets", [])
    is_live = state in ("starting", "running", "paused", "stopping")
    status: dict[str, Any] = {
        "state": state,
        "explanation": _explanation(state, history, now_s, is_certain=silent_after_s == 0),
        "is_live": is_live,
        "phase": figures.get("phase", ""),
        "run_id": run.get("run_id", name),
        "name": run.get("name", name),
        "attempt": run.get("attempt", 1),
        "target": run.get("target", ""),
        "algorithm": run.get("algorithm", ""),
        "block_size": run.get("block_size"),
        "reuse": run.get("reuse", 1),
        "command": run.get("command", ""),
        "step": history.num_steps,
        "total_steps": history.total_steps,
        "elapsed_s": round(history.elapsed_s, 1),
        "left_s": _left_s(history) if state == "running" else None,
        "age_s": None if history.last_time_s is None else round(max(0.0, now_s - history.last_time_s), 1),
        "expected": history.steps.last("expected_smooth"),
        "loss": history.steps.last("loss_smooth"),
        "learning_rate": history.steps.last("learning_rate"),
        "train_tokens_per_s": history.steps.last("train_tokens_per_s"),
        "wait": history.steps.last("wait"),
        "capture_tokens_per_s": history.seconds.last("capture_tokens_per_s"),
        "tau_first": _tau(history, 0),
        "tau_last": _tau(history, -1),
        "targets": targets,
        "autoscaling": figures.get("autoscaling"),
        "bottleneck": None,
    }
    for field in ("tokens_captured", "tokens_trained", "resident_bytes", "peak_bytes", "capacity_bytes"):
        status[field] = figures.get(field)
    if state == "running" and figures:
        status["bottleneck"] = asdict(find_bottleneck(_load(status, targets)))
    return status


def _state(history: History, now_s: float, silent_after_s: float) -> State:
    if history.last_time_s is None:
        return "empty"
    if history.end is not None:
        outcome: State = history.end["outcome"]
        return outcome
    if now_s - history.last_time_s > silent_after_s or silent_after_s == 0:
        return "silent"
    if history.steered is not None:
        return history.steered
    return "running" if len(history.steps) and history.figures else "starting"


def _explanation(state: State, history: History, now_s: float, *, is_certain: bool) -> str:
    command = (history.run or {}).get("command")
    again = f"Run the same command again to go on from the last checkpoint: {command}" if command else ""
    if state == "silent":
        age = duration(now_s - (history.last_time_s or now_s))
        said = (
            f"The run ended {age} ago without saying so"
            if is_certain
            else f"Nothing has been heard of the run for {age}"
        )
        return f"{said}: its driver was killed, or the machine went down. {again}".rstrip()
    if state == "failed":
        return f"The run failed: {(history.end or {})['message']}. {again}".rstrip()
    if state == "stopped":
        return f"The run was stopped. {again}".rstrip()
    if state == "finished":
        return "The run is finished."
    if state == "paused":
        return "The run is paused: no further step begins. The targets go on until the buffer is full."
    if state == "stopping":
        return "The run ends after its step, with a checkpoint."
    if state == "empty":
        return "Nothing has been recorded yet."
    phase = str((history.figures or {}).get("phase", ""))
    return f"{phase[:1].upper()}{phase[1:]}."


def duration(seconds: float) -> str:
    """Seconds for people: 45 s, 12 min, 3 h 5 min, 2 d 3 h."""
    minutes = int(seconds) // 60
    if seconds < 120:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes // (24 * 60)} d {minutes // 60 % 24} h"


def _left_s(history: History) -> float | None:
    rate = history.steps_per_s()
    if rate is None or not history.total_steps:
        return None
    return round(max(0, history.total_steps - history.num_steps) / rate, 1)


def _tau(history: History, index: int) -> dict[str, Any] | None:
    if not history.evaluations or (index == -1 and len(history.evaluations) < 2):
        return None
    found = history.evaluations[index]
    return {key: found.get(key) for key in ("label", "step", "accepted_length", "interval", "lossless")}


def _load(status: dict[str, Any], targets: list[dict[str, Any]]) -> Load:
    wanted = [target for target in targets if target["state"] != "draining"]
    missing = [target for target in wanted if target["state"] != "serving"]
    own = status["autoscaling"]
    return Load(
        run=status["run_id"],
        wait_fraction=status["wait"],
        fill=(status["resident_bytes"] or 0) / max(1, status["capacity_bytes"] or 1),
        capture_tokens_per_s=status["capture_tokens_per_s"] or 0.0,
        train_tokens_per_s=status["train_tokens_per_s"] or 0.0,
        num_serving=len(wanted) - len(missing),
        num_targets=len(wanted),
        missing="; ".join(
            f"target {target['index']} is {target['state']}" + (f": {target['message']}" if target["message"] else "")
            for target in missing
        ),
        autoscaling=f"{own['min']} to {own['max']}" if own and own["is_on"] else "",
    )
