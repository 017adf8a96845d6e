"""`slipstream compare` as a user runs it, with drafters of all three algorithms, and with wrong input."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import Command
from untrained import DEMO_TARGET, save_untrained, write_turns

Start = Callable[..., Command]

NO_BLOCK = {"block_size": 7, "mask_token_id": None, "markov_rank": 0}


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    save_untrained(tmp_path / "dspark" / "step_1")
    save_untrained(tmp_path / "dflash" / "step_1", algorithm="dflash", markov_rank=0)
    save_untrained(
        tmp_path / "eagle3" / "step_1",
        algorithm="eagle3",
        target_layer_ids=(0, 1, 2, 3, 4),
        ttt_length=2,
        **NO_BLOCK,
    )
    tasks = write_turns(tmp_path / "tasks", gsm8k=["1+1?", "2+2?"], mbpp=["def f(x):", "def g(x):"])
    return [
        "compare", "--target", str(DEMO_TARGET), "--tasks-dir", str(tasks), "--threads", "1", "--max-new-tokens", "8",
        "--output-dir", "out",
    ]  # fmt: skip


def test_three_algorithms_are_compared_and_a_report_written(slipstream: Start, arguments, tmp_path: Path) -> None:
    drafters = ["dspark/step_1", "dflash/step_1", "eagle3/step_1"]
    answer = slipstream(*arguments, *drafters, "--json").json()
    assert list(answer["drafters"]) == ["dspark", "dflash", "eagle3"]
    for label, found in answer["drafters"].items():
        assert found["algorithm"] == label
        assert found["overall"]["samples"] == 4
        assert found["overall"]["accepted_length"] >= 1
        assert found["overall"]["speedup"] > 0
        assert 0 < found["draft_cost"]["all"]["all"]["share"] < 1
    assert len(answer["differences"]) == 3 * 5
    page = (tmp_path / "out" / "report.md").read_text()
    assert "slipstream compare" in page
    for name in ("acceptance.png", "accepted_length.png", "times.png"):
        assert f"({name})" in page
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")
    prompts = []
    for folder in sorted((tmp_path / "out" / "decoded").iterdir()):
        lines = map(json.loads, (folder / "records.jsonl").read_text().splitlines())
        prompts.append(sorted((line["task"], line["index"], line["prompt_hash"]) for line in lines))
    assert len(prompts) == 4
    assert all(found == prompts[0] for found in prompts)
    again = slipstream(*arguments, *drafters, "--json").json()
    for answered in (answer, again):
        answered.pop("provenance")
    assert again == answer


def test_single_drafter_is_wrong_usage_and_leaves_no_folder(slipstream: Start, arguments, tmp_path: Path) -> None:
    command = slipstream(*arguments, "dspark/step_1")
    assert command.result()[0] == 2, command.errors
    assert "two drafters or more" in " ".join(command.errors.split())
    assert "Traceback" not in command.errors
    assert not (tmp_path / "out").exists()
