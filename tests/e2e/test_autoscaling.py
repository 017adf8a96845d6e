"""A run that asks for a second target by itself, because its only one is too slow."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from commands import Command


def test_starving_run_scales_itself_and_says_why(slipstream: Callable[..., Command], tmp_path: Path) -> None:
    run = slipstream(
        "demo", "--steps", "10", "--json", "--no-dashboard", "evaluation.max_samples=0", "trainer.threads=1",
        # One answer at a time, and each is trained on once: the trainer waits for nearly all of its time.
        "target.max_batch_samples=1", "replay.reuse=1", "target.autoscale={max: 2, window_s: 0.5, up_cooldown_s: 0}",
    )  # fmt: skip
    summary = run.json()
    scaled = [event for event in summary["events"] if event["kind"] == "scaling"]
    assert [event["message"].partition(":")[0] for event in scaled] == ["targets scaled from 1 to 2"]
    assert "the trainer waited" in scaled[0]["message"]
    assert summary["ledger"]["balanced"]
    assert summary["steps"] == 10

    records = [json.loads(line) for line in (tmp_path / "slipstream-demo" / "telemetry.jsonl").read_text().splitlines()]
    events = [record for record in records if record["kind"] == "event" and record["event"] == "scaling"]
    assert [record["message"] for record in events] == [scaled[0]["message"]]
    figures = [record for record in records if record["kind"] == "figures"]
    assert figures[-1]["autoscaling"] == {"is_on": True, "min": 1, "max": 2}
    assert max(len(record["targets"]) for record in figures) == 2
