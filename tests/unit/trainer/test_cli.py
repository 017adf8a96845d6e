from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import Result
from typer.testing import CliRunner

import trainer.job
from services.errors import DeadlineError
from services.prompts.ledger import LedgerSummary
from trainer.cli import app
from trainer.recipe import Recipe
from trainer.summary import Summary


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    target = tmp_path / "target"
    target.mkdir()
    config = {"model_type": "qwen3", "num_hidden_layers": 8, "hidden_size": 64, "vocab_size": 160_000}
    (target / "config.json").write_text(json.dumps(config))
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"target": {"model": "./target"}, "prompts": {"source": "stdlib"}}))
    return path


def slipstream(*arguments: Any) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def summary(**changes: Any) -> Summary:
    ledger = LedgerSummary(planned=1, trained=1, skipped=0, not_reached=0, captured=1, recaptured=0, balanced=True)
    figures = dict.fromkeys(Summary.model_fields, None) | {
        "run_id": "r", "output_dir": "o", "steps": 1, "tokens_trained": 2, "tokens_captured": 2, "total_s": 1.0,
        "peak_buffer_bytes": 3, "buffer_capacity_bytes": 4, "cache_bytes_avoided": 5, "features": {}, "ledger": ledger,
        "checkpoint": "o/step_1", "events": (),
    }  # fmt: skip
    return Summary.model_validate(figures | changes)


class FakeJob:
    """Stands in for `run_job`: remembers the recipe, then returns or raises what it is given."""

    def __init__(self, outcome: Summary | BaseException) -> None:
        self.outcome = outcome
        self.recipe: Recipe | None = None
        self.options: dict[str, Any] = {}

    def __call__(self, recipe: Recipe, console: Any, **options: Any) -> Summary:
        self.recipe, self.options = recipe, options
        if isinstance(self.outcome, BaseException):
            raise self.outcome
        return self.outcome


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch) -> FakeJob:
    fake = FakeJob(summary())
    monkeypatch.setattr(trainer.job, "run_job", fake)
    monkeypatch.setattr("trainer.commands.run._stop_on_sigterm", lambda: None)
    return fake


@pytest.mark.parametrize(
    "command", [[], ["demo"], ["run"], ["bench", "features"], ["target", "serve"], ["replay", "serve"]]
)
def test_help_names_every_command(command: list[str]) -> None:
    result = slipstream(*command, "--help")
    assert result.exit_code == 0
    assert "Usage" in result.output


@pytest.mark.parametrize(
    "arguments", [["nonsense"], ["run"], ["demo", "--steps", "0"], ["demo", "--steps", "x"], ["demo", "--no-such"]]
)
def test_wrong_usage_exits_with_2(arguments: list[str]) -> None:
    assert slipstream(*arguments).exit_code == 2


def test_missing_recipe_exits_with_2_and_names_it(tmp_path: Path) -> None:
    result = slipstream("run", tmp_path / "none.yaml")
    assert result.exit_code == 2
    assert "none.yaml" in result.stderr
    assert result.stdout == ""


def test_unknown_key_exits_with_2_and_names_the_nearest(recipe_file: Path) -> None:
    result = slipstream("run", recipe_file, "trainer.max_step=3")
    assert result.exit_code == 2
    assert "did you mean trainer.max_steps?" in result.stderr


def test_missing_target_exits_with_1(recipe_file: Path) -> None:
    (recipe_file.parent / "target" / "config.json").unlink()
    assert slipstream("run", recipe_file, "--dry-run").exit_code == 1


def test_dry_run_prints_the_resolved_recipe_and_starts_nothing(recipe_file: Path, job: FakeJob) -> None:
    result = slipstream("run", recipe_file, "trainer.max_steps=7", "--dry-run", "--json")
    assert result.exit_code == 0
    answer = json.loads(result.stdout)
    assert answer["recipe"]["trainer"]["max_steps"] == 7
    assert answer["recipe"]["drafter"]["target_layer_ids"] == [1, 2, 3, 4, 5]
    assert answer["bytes_per_token"] == (5 + 1) * 64 * 2
    assert job.recipe is None


@pytest.mark.parametrize("name", ["123", "null", "a: b # c", "ü [x]"])
def test_output_dir_is_taken_as_it_is(recipe_file: Path, job: FakeJob, name: str) -> None:
    assert slipstream("run", recipe_file, "--output-dir", name).exit_code == 0
    assert job.recipe is not None
    assert job.recipe.output_dir == Path(name)


def test_demo_options_become_settings_and_overrides_win(job: FakeJob) -> None:
    assert slipstream("demo", "--steps", "5", "--drafter", "dspark", "trainer.seed=9", "target.model=x").exit_code == 0
    assert job.recipe is not None
    assert (job.recipe.trainer.max_steps, job.recipe.trainer.seed, job.recipe.target.model) == (5, 9, "x")
    assert job.recipe.output_dir == Path("slipstream-demo")
    assert job.options["local_ray"] is True


def test_json_is_one_line_on_stdout(recipe_file: Path, job: FakeJob) -> None:
    result = slipstream("run", recipe_file, "--json")
    assert result.exit_code == 0
    assert result.stdout.count("\n") == 1
    assert json.loads(result.stdout)["checkpoint"] == "o/step_1"


def test_run_that_fails_exits_with_1_and_says_why(recipe_file: Path, job: FakeJob) -> None:
    job.outcome = DeadlineError("targets [0] did not serve")
    result = slipstream("run", recipe_file, "--json")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "error: targets [0] did not serve\n"


def test_defect_keeps_its_traceback(recipe_file: Path, job: FakeJob) -> None:
    job.outcome = ZeroDivisionError("a defect")
    assert isinstance(slipstream("run", recipe_file).exception, ZeroDivisionError)


def test_interrupted_run_exits_with_1_and_says_how_to_resume(
    recipe_file: Path, job: FakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    job.outcome = KeyboardInterrupt()
    monkeypatch.setattr("sys.argv", ["slipstream", "run", "my recipe.yaml", "drafter.target_layer_ids=[1, 2]"])
    result = slipstream("run", recipe_file)
    assert result.exit_code == 1
    assert "slipstream run 'my recipe.yaml' 'drafter.target_layer_ids=[1, 2]'" in result.stderr


def test_unbalanced_ledger_exits_with_1_and_quotes_the_problems(recipe_file: Path, job: FakeJob) -> None:
    ledger = LedgerSummary(
        planned=1, trained=2, skipped=0, not_reached=0, captured=1, recaptured=0, balanced=False, problems=("use 3?",)
    )
    job.outcome = summary(ledger=ledger)
    result = slipstream("run", recipe_file, "--json")
    assert result.exit_code == 1
    assert "does not balance: use 3?" in result.stderr
    assert json.loads(result.stdout)["ledger"]["balanced"] is False


def test_lossy_decoding_exits_with_1(recipe_file: Path, job: FakeJob) -> None:
    job.outcome = summary(lossless=False)
    result = slipstream("run", recipe_file)
    assert result.exit_code == 1
    assert "not lossless" in result.stderr


def test_password_on_the_command_line_is_warned_of_and_never_repeated(recipe_file: Path) -> None:
    plan = slipstream("run", recipe_file, "--dry-run", "--json", "replay.redis=redis://me:secret@host:1/0")
    assert plan.exit_code == 0
    assert "SLIPSTREAM_REDIS_PASSWORD" in plan.stderr
    assert json.loads(plan.stdout)["recipe"]["replay"]["redis"] == "redis://me@host:1/0"
    assert "secret" not in plan.output
