"""`slipstream eval` as a user runs it: over tasks in a folder, killed and gone on with, and with wrong input."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import Command
from untrained import DEMO_TARGET, save_untrained, write_turns

Start = Callable[..., Command]

PROMPTS = [f"def f{i}(x): return" for i in range(6)]


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    checkpoint = save_untrained(tmp_path / "drafter")
    tasks = write_turns(tmp_path / "tasks", gsm8k=PROMPTS, mbpp=PROMPTS, mt_bench=PROMPTS)
    return [
        "eval", "--target", str(DEMO_TARGET), "--drafter", str(checkpoint), "--tasks-dir", str(tasks),
        "--threads", "1", "--batch-size", "2", "--output-dir", "out",
    ]  # fmt: skip


def records(folder: Path) -> int:
    path = folder / "out" / "records.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_evaluation_over_a_folder_of_tasks_gives_figures_and_files(
    slipstream: Start, arguments, tmp_path: Path
) -> None:
    short = [*arguments, "--max-samples", "2", "--max-new-tokens", "8"]
    answer = slipstream(*short, "--json").json()
    assert list(answer["tasks"]) == ["gsm8k", "mbpp", "mt-bench"]
    for figures in answer["tasks"].values():
        low, high = figures["interval"]
        assert 1 <= low <= figures["accepted_length"] <= high <= 4
        assert len(figures["accept_rate"]) == 3
        assert figures["samples"] == 2
        assert figures["speedup"] > 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "evaluation.json", "records.jsonl", "results.json", "results.csv", "tensorboard",
    }  # fmt: skip
    assert records(tmp_path) == 12
    code, table = slipstream(*short).result()  # again: nothing is left to decode
    assert code == 0
    assert records(tmp_path) == 12
    for name, figures in answer["tasks"].items():
        assert name in table
        assert f"{figures['accepted_length']:.2f}" in table


def test_killed_evaluation_goes_on_where_it_stopped(slipstream: Start, arguments, tmp_path: Path) -> None:
    command = [*arguments, "--max-new-tokens", "48"]
    killed = slipstream(*command)
    killed.wait_until(lambda: records(tmp_path) >= 2, "no record yet")
    killed.signal_group(signal.SIGKILL)
    killed.result()
    before = (tmp_path / "out" / "records.jsonl").read_bytes()
    answer = slipstream(*command, "--json").json()
    whole = before[: before.rfind(b"\n") + 1]
    assert (tmp_path / "out" / "records.jsonl").read_bytes().startswith(whole)
    keys = [
        (record["kind"], record["task"], record["index"])
        for record in map(json.loads, (tmp_path / "out" / "records.jsonl").read_text().splitlines())
    ]
    assert len(keys) == len(set(keys)) == 36
    assert sum(figures["samples"] for figures in answer["tasks"].values()) == 18
