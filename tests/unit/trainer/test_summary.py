from __future__ import annotations

import json

import pytest

from services.prompts.ledger import LedgerSummary
from trainer.summary import Summary, format_bytes


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (48 * 1024**2, "48.0 MiB"),
        (38 * 1024**4, "38.0 TiB"),
        (5000 * 1024**4, "5000.0 TiB"),
    ],
)
def test_bytes_are_shown_in_the_unit_below_1024(count: int, text: str) -> None:
    assert format_bytes(count) == text


def test_summary_json_has_the_figures_that_scripts_read() -> None:
    ledger = LedgerSummary(
        planned=1, trained=1, skipped=0, not_reached=0, captured=1, recaptured=0, balanced=False, problems=("a", "b")
    )
    figures = dict.fromkeys(Summary.model_fields, None) | {
        "run_id": "r", "output_dir": "o", "steps": 1, "tokens_trained": 2, "tokens_captured": 2, "total_s": 1.0,
        "peak_buffer_bytes": 3, "buffer_capacity_bytes": 4, "cache_bytes_avoided": 5, "features": {}, "ledger": ledger,
        "checkpoint": "o/step_1", "events": (),
    }  # fmt: skip
    answer = json.loads(Summary.model_validate(figures).model_dump_json())
    assert answer.keys() >= {
        "run_id", "output_dir", "steps", "resumed_from_step", "final_loss", "accepted_length_start",
        "accepted_length_end", "tokens_trained", "tokens_captured", "peak_buffer_bytes", "buffer_capacity_bytes",
        "cache_bytes_avoided", "features", "trainer_wait_fraction", "ledger", "checkpoint", "events",
    }  # fmt: skip
    assert answer["ledger"].keys() == {
        "planned", "trained", "skipped", "not_reached", "captured", "recaptured", "balanced",
    }  # fmt: skip
