"""Settings of a small run, as a coordinator and its schedule take them."""

from __future__ import annotations

from services.contracts import LastRows, TableSignature
from services.prompts.records import CoordinatorSettings


def schedule_settings(**changes: object) -> CoordinatorSettings:
    """Two ranks, each a micro-batch of one sequence a step; `changes` override."""
    values = {
        "reuse": 1,
        "last_rows": LastRows.BETWEEN,
        "world_size": 2,
        "micro_batch_size": 1,
        "accumulation": 1,
        "max_steps": None,
        "deterministic": False,
        "tail": "pad",
        "signature": TableSignature(fingerprint="f", layer_ids=(1,), hidden_size=4, dtype="bf16"),
        "lookahead_captures": 100,
        "capture_log": "unused",
        "answers": "unused",
        "lives": "unused",
        "ledger": None,
        "generation": 7,
    } | changes
    return CoordinatorSettings.model_validate(values)
