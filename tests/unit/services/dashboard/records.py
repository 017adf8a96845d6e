"""Records of a made-up run, as its driver writes them."""

from __future__ import annotations

from typing import Any

Record = dict[str, Any]

MIB = 1024**2


def run(time_s: float, *, attempt: int = 1, resumed_from_step: int | None = None, **fields: Any) -> Record:
    return {
        "kind": "run", "time_s": time_s, "run_id": "demo-1", "name": "demo", "attempt": attempt,
        "resumed_from_step": resumed_from_step, "target": "org/target", "algorithm": "dspark", "block_size": 2,
        "reuse": 1, "total_steps": 100, "command": "slipstream run demo.yaml", **fields,
    }  # fmt: skip


def step(number: int, time_s: float, *, loss: float = 1.0, wait_s: float = 0.0, **metrics: float) -> Record:
    return {
        "kind": "step", "time_s": time_s, "step": number, "total_steps": 100,
        "metrics": {"loss": loss, "tau_probabilistic": 2.0, "accept_rate@0": 0.5, "accept_rate@1": 0.25, **metrics},
        "learning_rate": 1e-3, "samples": 4, "tokens": 400, "tokens_per_s": 800.0, "wait_s": wait_s, "step_s": 0.5,
        "wait_fraction": None,
    }  # fmt: skip


def figures(time_s: float, *, at_step: int = 0, resident: int = 8 * MIB, **fields: Any) -> Record:
    serving = {"index": 0, "state": "serving", "address": "127.0.0.1:5000", "message": ""}
    return {
        "kind": "figures", "time_s": time_s, "phase": "training", "step": at_step, "tokens_captured": 1000,
        "tokens_trained": 900, "capture_tokens_per_s": 500.0, "resident_bytes": resident, "peak_bytes": 9 * MIB,
        "capacity_bytes": 32 * MIB, "targets": [serving], **fields,
    }  # fmt: skip


def event(time_s: float, kind: str, message: str = "so it was") -> Record:
    return {"kind": "event", "time_s": time_s, "event": kind, "message": message}


def evaluation(time_s: float, at_step: int, tau: float) -> Record:
    return {
        "kind": "evaluation", "time_s": time_s, "label": f"step_{at_step}", "step": at_step, "accepted_length": tau,
        "interval": [tau - 0.1, tau + 0.1], "accept_rate": [0.5, 0.2], "lossless": True,
    }  # fmt: skip


def end(time_s: float, outcome: str = "finished", message: str = "the run is done") -> Record:
    return {"kind": "end", "time_s": time_s, "outcome": outcome, "message": message}
