"""The main job as a user runs it: real Ray, Redis, gRPC and DeepSpeed, started by the command line."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import torch
from commands import SMALL, Command, steps_done, steps_measured

from drafters import load_drafter
from trainer.checkpoint import checkpoint_step, latest_checkpoint

Start = Callable[..., Command]

SUMMARY_KEYS = {
    "run_id", "output_dir", "steps", "resumed_from_step", "final_loss", "accepted_length_start", "accepted_length_end",
    "tokens_trained", "tokens_captured", "peak_buffer_bytes", "buffer_capacity_bytes", "cache_bytes_avoided",
    "features", "trainer_wait_fraction", "ledger", "checkpoint", "events", "evaluation_cost",
}  # fmt: skip
BATCH = 4
"""Sequences of one optimizer step of the demo's recipe."""
REUSE = 3
"""How often it trains on each capture."""

LEDGER_KEYS = {"planned", "trained", "skipped", "not_reached", "captured", "recaptured", "balanced"}


def test_demo_trains_sums_up_and_goes_on(slipstream: Start, tmp_path: Path) -> None:
    command = slipstream("demo", "--steps", "20", "--no-dashboard", "--json", *SMALL)
    summary = command.json()
    command.assert_nothing_left()

    assert summary.keys() >= SUMMARY_KEYS
    assert summary["ledger"].keys() == LEDGER_KEYS
    assert (summary["steps"], summary["resumed_from_step"]) == (20, None)
    ledger = summary["ledger"]
    assert ledger["balanced"]
    assert ledger["trained"] == 20 * BATCH
    assert ledger["planned"] == ledger["trained"] + ledger["skipped"] + ledger["not_reached"]
    assert ledger["captured"] >= ledger["trained"] / REUSE
    assert 0 < summary["peak_buffer_bytes"] <= summary["buffer_capacity_bytes"]
    assert summary["tokens_captured"] >= summary["tokens_trained"] / REUSE > 0
    assert summary["lossless"] is True
    assert summary["accepted_length_start"] >= 1.0
    assert steps_measured(tmp_path / "slipstream-demo") >= {0, 20}
    cost = summary["evaluation_cost"]
    assert 0 < cost["num_steps_during"] + cost["num_steps_otherwise"] < 20
    checkpoint = Path(summary["checkpoint"])
    assert (tmp_path / "slipstream-demo" / "step_latest").resolve() == checkpoint
    load_drafter(checkpoint, dtype=torch.float32)

    # Goes on with features that travel otherwise: what is trained on what stays the same.
    longer = slipstream("demo", "--steps", "30", "--json", *SMALL, "replay.wire_dtype=fp8_e4m3").json()
    assert (longer["steps"], longer["resumed_from_step"]) == (30, 20)
    assert longer["run_id"] == summary["run_id"]
    assert longer["ledger"]["trained"] == 30 * BATCH
    assert longer["ledger"]["balanced"]
    assert longer["accepted_length_start"] == summary["accepted_length_start"]
    assert set(summary["features"]["saved_by_dtype_bytes"]) == {"bf16"}
    features = longer["features"]
    assert set(features["saved_by_dtype_bytes"]) == {"bf16", "fp8_e4m3"}
    assert features["saved_by_dtype_bytes"]["fp8_e4m3"] > 0 == features["saved_by_dtype_bytes"]["bf16"]
    assert features["saved_by_rows_bytes"] > 0
    saved = features["saved_by_rows_bytes"] + sum(features["saved_by_dtype_bytes"].values())
    assert features["streamed_bytes"] + saved == features["all_rows_bytes"]
    assert features["streamed_bytes"] > summary["features"]["streamed_bytes"] > 0


def test_demo_killed_half_way_leaves_nothing_and_resumes(slipstream: Start, tmp_path: Path) -> None:
    output_dir = tmp_path / "slipstream-demo"
    command = slipstream("demo", "--steps", "1000", "--json", *SMALL)
    command.wait_until(lambda: steps_done(output_dir) >= 17)
    command.signal_group(signal.SIGKILL)
    command.process.wait()
    command.assert_nothing_left()

    checkpoint = latest_checkpoint(output_dir)
    assert checkpoint is not None
    resumed_from = checkpoint_step(checkpoint)
    assert resumed_from >= 15
    steps = resumed_from + 20
    summary = slipstream("demo", "--steps", str(steps), "--json", *SMALL).json()
    assert summary["resumed_from_step"] == resumed_from
    assert summary["steps"] == steps
    ledger = summary["ledger"]
    assert ledger["balanced"]
    assert ledger["trained"] == steps * BATCH
    assert ledger["recaptured"] > 0, "what was captured but not trained before the kill is captured again"


def test_demo_interrupted_writes_a_checkpoint_and_says_how_to_resume(slipstream: Start, tmp_path: Path) -> None:
    output_dir = tmp_path / "slipstream-demo"
    command = slipstream("demo", "--steps", "1000", *SMALL)
    command.wait_until(lambda: steps_done(output_dir) >= 7)
    command.wait_until(lambda: max(steps_measured(output_dir), default=0) > 0, "no checkpoint is measured in training")
    command.signal_group(signal.SIGINT)
    code, _ = command.result()
    assert code == 1
    assert "run the same command again" in command.errors
    assert "Traceback" not in command.errors
    command.assert_nothing_left()
    assert int((output_dir / "step_latest").resolve().name.removeprefix("step_")) >= 7


def test_interrupt_during_start_leaves_nothing(slipstream: Start, tmp_path: Path) -> None:
    command = slipstream("demo", "--steps", "1000", *SMALL)
    command.wait_until(lambda: len(command.left_behind()) > 4)
    command.signal_group(signal.SIGINT)
    code, _ = command.result()
    assert code == 1
    assert "Traceback" not in command.errors
    command.assert_nothing_left()


def test_two_ranks_and_two_targets_train_together(slipstream: Start) -> None:
    command = slipstream(
        "demo", "--steps", "6", "--json", *SMALL,
        "trainer.world_size=2", "trainer.micro_batch_size=2", "target.replicas=2",
    )  # fmt: skip
    summary = command.json()
    assert summary["steps"] == 6
    assert summary["ledger"]["balanced"]
    assert summary["ledger"]["trained"] == 6 * BATCH
    command.assert_nothing_left()
