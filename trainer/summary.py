"""What a run ends with: one record that scripts read as JSON and people read as a table (specs: cli)."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from services.contracts import Event


class LedgerFigures(BaseModel):
    """The ledger in numbers; every planned use is trained, skipped or not reached."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    planned: int
    trained: int
    skipped: int
    not_reached: int
    captured: int
    recaptured: int
    balanced: bool


class Summary(BaseModel):
    """The figures of a finished attempt of a run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    run_id: str
    output_dir: str
    steps: int
    resumed_from_step: int | None
    final_loss: float | None
    accepted_length_start: float | None
    accepted_length_start_interval: tuple[float, float] | None
    accepted_length_end: float | None
    accepted_length_end_interval: tuple[float, float] | None
    lossless: bool | None
    """Greedy output equalled the target's own, token for token; None where nothing was decoded greedily."""
    tokens_trained: int
    tokens_captured: int
    peak_buffer_bytes: int
    buffer_capacity_bytes: int
    cache_bytes_avoided: int
    trainer_wait_fraction: float | None
    first_step_s: float | None
    """Seconds from the start of the command to the end of this attempt's first optimizer step."""
    total_s: float
    ledger: LedgerFigures
    checkpoint: str | None
    events: list[Event]


def format_bytes(count: float) -> str:
    """Bytes for people: 1.5 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
