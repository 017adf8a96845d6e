from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner
from untrained import DEMO_TARGET, save_untrained, write_turns

from trainer.cli import app


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_untrained(tmp_path_factory.mktemp("drafter"))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with prompts in it."""
    monkeypatch.chdir(tmp_path)
    write_turns(tmp_path / "tasks", gsm8k=["1+1?"], mbpp=["Write f.", "Write g."])
    (tmp_path / "broken.jsonl").write_text('{"turns": ["a"]}\n{no\n')
    (tmp_path / "empty.jsonl").write_text("")
    return tmp_path


def evaluate(checkpoint: Path, *more: object) -> Result:
    common = ["eval", "--target", DEMO_TARGET, "--drafter", checkpoint, "--tasks-dir", "tasks", "--output-dir", "out"]
    return CliRunner().invoke(app, [str(argument) for argument in (*common, "--max-new-tokens", 4, *more)])


@pytest.mark.parametrize(
    ("more", "code", "words"),
    [
        (["--tasks", "gsm9k"], 2, ("'gsm9k'", "arena-hard-v2")),
        (["--tasks", "alpaca"], 2, ("alpaca.jsonl",)),
        (["--prompts", "broken.jsonl"], 1, ("broken.jsonl:2", "not JSON")),
        (["--prompts", "empty.jsonl"], 1, ("empty.jsonl", "empty")),
        (["--prompts", "missing.jsonl"], 1, ("missing.jsonl",)),
        (["--drafter", "nowhere"], 1, ("nowhere", "--drafter")),
        (["--target", "./nowhere"], 1, ("nowhere",)),
        (["--device", "cuda"], 2, ("--device cpu",)),
        (["--max-samples", "0"], 2, ("max-samples",)),
        (["--temperature", "-1"], 2, ("temperature",)),
    ],
)
def test_wrong_input_of_an_evaluation_is_named(folder, checkpoint, more, code, words):
    result = evaluate(checkpoint, *more)
    assert result.exit_code == code, result.output
    for word in words:
        assert word in result.output
    assert not (folder / "out").exists()


def test_evaluation_prints_one_json_object_and_refuses_its_folder_to_others(folder, checkpoint):
    done = evaluate(checkpoint, "--json", "--no-speedup", "--tasks", "mbpp, gsm8k")
    assert done.exit_code == 0, done.output
    assert done.stdout.count("\n") == 1
    answer = json.loads(done.stdout)
    assert list(answer["tasks"]) == ["gsm8k", "mbpp"]
    assert (answer["tasks"]["mbpp"]["samples"], answer["tasks"]["mbpp"]["speedup"]) == (2, None)
    other = evaluate(checkpoint, "--no-speedup", "--tasks", "mbpp, gsm8k", "--temperature", "0")
    assert other.exit_code == 2
    assert "temperature was 1.0 and is 0.0" in other.output


def test_interrupted_evaluation_says_how_to_go_on(folder, checkpoint, monkeypatch):
    def interrupt(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("evaluation.session.run", interrupt)
    monkeypatch.setattr("sys.argv", ["slipstream", "eval", "--drafter", "my run/step_best"])
    result = evaluate(checkpoint)
    assert result.exit_code == 1
    assert "slipstream eval --drafter 'my run/step_best'" in result.output
