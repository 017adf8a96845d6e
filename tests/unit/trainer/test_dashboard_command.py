from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from services.errors import UsageError
from trainer.cli import app
from trainer.commands.dashboard import find_run


def make_run(path: Path, run_id: str, time_s: float = 1000.0) -> Path:
    path.mkdir(parents=True)
    record = path / "run.json"
    record.write_text(json.dumps({"run_id": run_id}))
    os.utime(record, (time_s, time_s))
    return path


def test_output_directory_is_taken_as_it_is(tmp_path: Path) -> None:
    path = make_run(tmp_path / "deep" / "down", "qwen-1")
    assert find_run("deep/down", tmp_path) == path
    assert find_run(str(path), Path("/")) == path


@pytest.mark.parametrize("wanted", ["qwen-4b-a1b2c3", "qwen-4b", "first"])
def test_run_is_found_by_its_id_its_name_and_its_folder(tmp_path: Path, wanted: str) -> None:
    path = make_run(tmp_path / "runs" / "first", "qwen-4b-a1b2c3")
    make_run(tmp_path / "runs" / "second", "demo-d4e5f6")
    assert find_run(wanted, tmp_path) == path


def test_demo_is_the_default_and_else_the_only_run(tmp_path: Path) -> None:
    only = make_run(tmp_path / "runs" / "only", "qwen-1")
    assert find_run(None, tmp_path) == only
    demo = make_run(tmp_path / "slipstream-demo", "demo-1")
    assert find_run(None, tmp_path) == demo


def test_several_runs_are_listed(tmp_path: Path) -> None:
    make_run(tmp_path / "runs" / "a", "qwen-1", 2000.0)
    make_run(tmp_path / "runs" / "b", "qwen-2", 1000.0)
    for wanted in (None, "qwen"):
        with pytest.raises(UsageError, match=r"2 runs could be meant.*runs/b \(qwen-2\), runs/a \(qwen-1\)$"):
            find_run(wanted, tmp_path)


def test_unknown_run_lists_what_was_found(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"^no run; there is none in .*slipstream-demo and under \./runs$"):
        find_run(None, tmp_path)
    make_run(tmp_path / "slipstream-demo", "demo-1")
    with pytest.raises(UsageError, match=r"^llama is no output directory.*here are: slipstream-demo \(demo-1\)$"):
        find_run("llama", tmp_path)


def test_folder_with_an_unreadable_record_does_not_hide_the_others(tmp_path: Path) -> None:
    (make_run(tmp_path / "runs" / "broken", "x") / "run.json").write_text("{")
    good = make_run(tmp_path / "runs" / "good", "qwen-1")
    assert find_run("qwen", tmp_path) == good


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--host", "0.0.0.0"), "without TLS"),
        (("--tls-cert", "c.pem"), "go together"),
        (("--tls-cert", "c.pem", "--tls-key", "k.pem"), "cannot read certificate file c.pem"),
    ],
)
def test_page_that_others_could_read_along_is_refused(tmp_path: Path, arguments: tuple[str, ...], says: str) -> None:
    run = make_run(tmp_path / "run", "qwen-1")
    result = CliRunner().invoke(app, ["dashboard", str(run), *arguments])
    assert result.exit_code == 2
    assert says in " ".join(result.output.split())
