from __future__ import annotations

from pathlib import Path

import pytest

from services.errors import OutputDirError
from trainer.ray_job import JOB_VARIABLE, STOP_WAIT_S, STOP_WAIT_VARIABLE, adapt_to_ray_job, lasting_output_dir
from trainer.recipe import Recipe, build_recipe

HOME = Path("/home/someone")
UNPACKED = Path("/tmp/ray/session_1/runtime_resources/working_dir_files/_ray_pkg_0123456789abcdef")


def recipe(folder: Path, output_dir: str = "runs/one") -> Recipe:
    tree = {
        "output_dir": output_dir,
        "target": {"model": str(folder / "model")},
        "prompts": {"source": str(folder / "data" / "train.jsonl"), "heldout": "/data/heldout.jsonl"},
    }
    return build_recipe(tree, "test")


@pytest.mark.parametrize(
    ("output_dir", "expected"),
    [
        ("runs/one", HOME / "runs/one"),
        ("./runs/../runs/one", HOME / "runs/one"),
        ("/data/runs/one", Path("/data/runs/one")),
    ],
)
def test_relative_output_dir_of_a_job_is_relative_to_home(output_dir: str, expected: Path) -> None:
    assert lasting_output_dir(Path(output_dir), cwd=UNPACKED, home=HOME) == expected


def test_job_without_an_uploaded_folder_keeps_its_output_dir() -> None:
    assert lasting_output_dir(Path("runs/one"), cwd=Path("/srv/checkout"), home=HOME) == Path("runs/one")


@pytest.mark.parametrize("output_dir", [str(UNPACKED / "runs"), "../_ray_pkg_another/runs"])
def test_output_dir_inside_the_unpacked_upload_is_refused(output_dir: str) -> None:
    with pytest.raises(OutputDirError, match="deletes after the job; choose another --output-dir"):
        lasting_output_dir(Path(output_dir), cwd=UNPACKED, home=HOME)


def test_command_outside_a_job_keeps_its_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(JOB_VARIABLE, raising=False)
    wanted = recipe(tmp_path)
    said: list[str] = []
    assert adapt_to_ray_job(wanted, said.append) is wanted
    assert said == []


def test_job_names_its_files_alike_wherever_they_are_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(JOB_VARIABLE, "{}")
    monkeypatch.setenv(STOP_WAIT_VARIABLE, str(STOP_WAIT_S))
    identities = []
    for name in ("_ray_pkg_1", "_ray_pkg_2"):
        folder = tmp_path / "working_dir_files" / name
        folder.mkdir(parents=True)
        monkeypatch.chdir(folder)
        said: list[str] = []
        adapted = adapt_to_ray_job(recipe(folder), said.append)
        identities.append(adapted.identity())
        assert adapted.target.model == "model"
        assert (adapted.prompts.source, adapted.prompts.heldout) == ("data/train.jsonl", "/data/heldout.jsonl")
        assert adapted.output_dir == Path.home() / "runs/one"
        assert len(said) == 1
        assert str(Path.home() / "runs/one") in said[0]
    assert identities[0] == identities[1]


def test_job_that_a_stop_would_kill_too_early_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(JOB_VARIABLE, "{}")
    monkeypatch.delenv(STOP_WAIT_VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    said: list[str] = []
    adapt_to_ray_job(recipe(tmp_path, "/data/one"), said.append)
    assert len(said) == 1
    assert "3 s after it asks" in said[0]
    assert "RAY_JOB_STOP_WAIT_TIME_S=270" in said[0]
