from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner
from untrained import DEMO_TARGET, save_untrained, write_turns

from evaluation.confidence.temperatures import TEMPERATURES_NAME, ConfidenceTemperatures
from trainer.cli import app


def arguments(folder: Path, *more: str) -> list[str]:
    return [
        "confidence", "--target", str(DEMO_TARGET), "--drafter", str(folder / "drafter"), "--tasks-dir",
        str(folder / "tasks"), "--output-dir", str(folder / "out"), "--max-new-tokens", "6", "--device", "cpu", *more,
    ]  # fmt: skip


def test_command_prints_what_it_found(tmp_path: Path) -> None:
    save_untrained(tmp_path / "drafter", algorithm="dspark")
    write_turns(tmp_path / "tasks", mbpp=["Write f.", "Write g."])
    more = ("--thresholds", "0.5", "--concurrency", "2", "--json")
    result = CliRunner().invoke(app, arguments(tmp_path, *more))
    assert result.exit_code == 0, result.output
    study = json.loads(result.stdout)
    assert [point["threshold"] for point in study["sweep"]] == [0.0, 0.5]
    assert [row["num_requests"] for row in study["throughput"]] == [2]
    # Again for people: nothing is decoded anew, and eval takes the temperatures from the drafter's folder.
    result = CliRunner().invoke(app, arguments(tmp_path, *more[:-1]))
    assert result.exit_code == 0, result.output
    for word in ("ECE", "AUROC", "Brier", "threshold", "scheduled", "reliability.png", TEMPERATURES_NAME):
        assert word in result.output
    options = arguments(tmp_path, "--confidence-threshold", "0.3", "--calibrated", "--no-speedup", "--json")
    options[options.index("--output-dir") + 1] = str(tmp_path / "eval")
    result = CliRunner().invoke(app, ["eval", *options[1:]])
    assert result.exit_code == 0, result.output
    saved = ConfidenceTemperatures.load(tmp_path / "drafter").temperatures
    assert json.loads(result.stdout)["settings"]["confidence_temperatures"] == list(saved)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--thresholds", "0,1.5"], "--thresholds 0,1.5: '1.5' is no number from 0 to 1"),
        (["--thresholds", "nan"], "--thresholds nan: 'nan' is no number from 0 to 1"),
        (["--thresholds", "0.1,"], "--thresholds 0.1,: '' is no number from 0 to 1"),
        (["--concurrency", "0"], "--concurrency 0: '0' is no number from 1 to 4096"),
        (["--concurrency", "1.5"], "--concurrency 1.5: '1.5' is no number from 1 to 4096"),
    ],
)
def test_numbers_out_of_bounds_are_refused_before_anything_is_loaded(
    tmp_path: Path, more: list[str], message: str
) -> None:
    write_turns(tmp_path / "tasks")
    result = CliRunner().invoke(app, arguments(tmp_path, *more))
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
    assert not (tmp_path / "out").exists()


def test_drafter_without_confidences_ends_with_the_way_out(tmp_path: Path) -> None:
    save_untrained(tmp_path / "drafter", algorithm="dflash", markov_rank=0)
    write_turns(tmp_path / "tasks")
    result = CliRunner().invoke(app, arguments(tmp_path))
    assert result.exit_code == 1
    assert "has no confidence head" in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("more", "message", "exit_code"),
    [
        ([], "give --confidence-threshold, too", 2),
        (["--confidence-threshold", "0.5"], f"has no {TEMPERATURES_NAME}: fit temperatures first", 1),
    ],
)
def test_calibrated_evaluation_needs_threshold_and_temperatures(
    tmp_path: Path, more: list[str], message: str, exit_code: int
) -> None:
    options = ["--target", str(DEMO_TARGET), "--drafter", str(tmp_path), "--calibrated", *more]
    result = CliRunner().invoke(app, ["eval", *options])
    assert result.exit_code == exit_code
    assert message in " ".join(result.output.split())
