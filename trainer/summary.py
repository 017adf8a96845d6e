"""What a run ends with: one record that scripts read as JSON and people read as a table (specs: cli)."""

from __future__ import annotations

from services.contracts import Event, Record
from services.prompts.ledger import LedgerSummary
from trainer.evaluation_cost import EvaluationCost
from trainer.traffic import FeatureTraffic


class Summary(Record):
    """The figures of a run at the end of an attempt; over all its attempts, unless a figure says otherwise."""

    run_id: str
    output_dir: str
    steps: int
    resumed_from_step: int | None
    final_loss: float | None
    """Mean over the run's last ten steps, or fewer if there are no ten."""
    accepted_length_start: float | None
    accepted_length_start_interval: tuple[float, float] | None
    accepted_length_end: float | None
    accepted_length_end_interval: tuple[float, float] | None
    lossless: bool | None
    """Greedy output equalled the target's own, token for token; None where nothing was decoded greedily."""
    tokens_trained: int
    tokens_captured: int
    peak_buffer_bytes: int
    """Of this attempt and of those before it that came to an end."""
    buffer_capacity_bytes: int
    cache_bytes_avoided: int
    """What a feature cache of the prompts captured so far takes: each once, every row of every layer, in bf16."""
    features: FeatureTraffic = FeatureTraffic()
    """Bytes that travelled from target to buffer, and what was saved of them."""
    trainer_wait_fraction: float | None
    """Of this attempt, after its first step; None before its second."""
    evaluation_cost: EvaluationCost | None = None
    """What measuring checkpoints cost the steps of this attempt; None where nothing is measured."""
    first_step_s: float | None
    """Seconds from the start of the command to the end of this attempt's first optimizer step."""
    total_s: float
    ledger: LedgerSummary
    checkpoint: str
    events: tuple[Event, ...]
    """Of this attempt."""


def format_bytes(count: float) -> str:
    """Bytes for people: 1.5 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
