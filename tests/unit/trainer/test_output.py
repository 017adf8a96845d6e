from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from services.errors import OutputDirError
from services.files import replace_text
from trainer.output import claim_output_dir
from trainer.recipe import Recipe

HOLDER = """
import sys
from pathlib import Path
from trainer.output import claim_output_dir
from trainer.recipe import Recipe
recipe = Recipe.model_validate_json(sys.argv[1])
with claim_output_dir(recipe):
    print("held", flush=True)
    sys.stdin.read()
"""


def recipe(output_dir: Path, **sections: Any) -> Recipe:
    tree = {"output_dir": str(output_dir), "target": {"model": "somewhere"}, "prompts": {"source": "stdlib"}}
    return Recipe.model_validate(tree | sections)


def test_new_directory_is_created_with_a_record_and_the_recipe(tmp_path: Path) -> None:
    wanted = recipe(tmp_path / "runs" / "one")
    with claim_output_dir(wanted) as output:
        assert output.path == tmp_path / "runs" / "one"
        assert output.attempt == 1
        assert output.run_id.startswith("run-")
        assert {path.name for path in output.path.iterdir()} == {".lock", "run.json", "recipe.yaml"}


def test_same_recipe_goes_on_with_the_run_and_counts_its_attempts(tmp_path: Path) -> None:
    with claim_output_dir(recipe(tmp_path / "run")) as output:
        first = output.run_id
    for attempt in (2, 3):
        with claim_output_dir(recipe(tmp_path / "run")) as output:
            assert (output.run_id, output.attempt) == (first, attempt)


def test_settings_that_leave_the_training_as_it_is_may_change(tmp_path: Path) -> None:
    with claim_output_dir(recipe(tmp_path / "run")):
        pass
    changed = recipe(tmp_path / "run", trainer={"max_steps": 3, "checkpoint_every": 1}, replay={"capacity": "1GiB"})
    with claim_output_dir(changed) as output:
        assert output.attempt == 2
        assert "max_steps: 3" in (output.path / "recipe.yaml").read_text()


def test_other_recipe_is_refused_naming_each_setting_with_both_values(tmp_path: Path) -> None:
    with claim_output_dir(recipe(tmp_path / "run")):
        pass
    other = recipe(tmp_path / "run", drafter={"block_size": 5}, trainer={"seed": 7})
    with (
        pytest.raises(OutputDirError, match=r"drafter\.block_size \(7 there, 5 here\), seed \(42 there, 7 here\)"),
        claim_output_dir(other),
    ):
        pass
    with claim_output_dir(recipe(tmp_path / "run")) as output:
        assert output.attempt == 2, "the refused attempt does not count"


def test_second_process_is_refused_until_the_first_ends(tmp_path: Path) -> None:
    wanted = recipe(tmp_path / "run")
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, wanted.model_dump_json()],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(OutputDirError, match="in use by another slipstream process"), claim_output_dir(wanted):
            pass
        holder.kill()
    with claim_output_dir(wanted) as output:
        assert output.attempt == 2


def test_foreign_folder_is_refused_and_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("do not touch")
    with (
        pytest.raises(OutputDirError, match="holds files that are no slipstream run"),
        claim_output_dir(recipe(tmp_path)),
    ):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("text", ["{", "[]", '{"run_id": "x"}'])
def test_record_of_something_else_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text(text)
    with (
        pytest.raises(OutputDirError, match=r"run\.json is no record of a slipstream run"),
        claim_output_dir(recipe(tmp_path)),
    ):
        pass
    assert (tmp_path / "run.json").read_text() == text


def test_directory_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(OutputDirError, match="cannot write to output_dir"),
        claim_output_dir(recipe(tmp_path / "file" / "run")),
    ):
        pass


def test_earlier_peak_is_the_last_summarys(tmp_path: Path) -> None:
    with claim_output_dir(recipe(tmp_path / "run")) as output:
        assert output.earlier_peak_bytes() == 0
        replace_text(output.summary, json.dumps({"peak_buffer_bytes": 77}))
        assert output.earlier_peak_bytes() == 77
        assert not list(output.path.glob("*.new"))
