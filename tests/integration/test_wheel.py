"""The wheel that users install: built from the sources alone, installed, and used from an empty folder."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from itertools import chain
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {"services", "drafters", "trainer", "evaluation"}


def run(*command: object, cwd: Path) -> str:
    """Run a command to its end; its output is the failure message if it fails."""
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, (
        f"{Path(str(command[0])).name} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
    )
    return done.stdout


@pytest.fixture(scope="module")
def sources() -> list[str]:
    """Paths of the files that are under version control, or would be if all that git does not ignore were added."""
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT).split("\0")
    return [path for path in listed if path and (ROOT / path).is_file()]


@pytest.fixture(scope="module")
def wheel(sources: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of a copy of the sources: what earlier builds left in the checkout cannot slip in."""
    source, dist = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for path in sources:
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        (source / path).write_bytes((ROOT / path).read_bytes())
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", dist, source, cwd=source)
    (built,) = dist.glob("slipstream_distill-*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`bin` of a new environment that has the wheel and, by a path file, the dependencies installed here.

    A path file adds a folder but does not run the path files in it, so the editable install cannot shadow the wheel.
    """
    environment = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", environment, cwd=environment)
    binaries = environment / "bin"
    run(
        *(sys.executable, "-m", "pip", f"--python={binaries / 'python'}", "--disable-pip-version-check"),
        *("install", "--quiet", "--no-deps", "--no-index", wheel),
        cwd=environment,
    )
    (site_packages,) = environment.glob("lib/python*/site-packages")
    (site_packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return binaries


def names_of(wheel: Path) -> list[str]:
    return zipfile.ZipFile(wheel).namelist()


def test_top_level_names_are_the_four_packages(wheel: Path) -> None:
    top = {name.partition("/")[0] for name in names_of(wheel)}
    assert {name for name in top if not name.endswith(".dist-info")} == PACKAGES


def test_wheel_holds_every_source_file_of_its_packages(wheel: Path, sources: list[str]) -> None:
    """Modules of a package that pyproject.toml does not list, and data that it does not name, would be missing."""
    wanted = {path for path in sources if path.partition("/")[0] in PACKAGES}
    held = {name for name in names_of(wheel) if name.partition("/")[0] in PACKAGES}
    assert held == wanted


def test_wheel_holds_scripts_recipe_and_target_of_the_demo(wheel: Path) -> None:
    names = names_of(wheel)
    assert any(name.startswith("services/replay/") and name.endswith(".lua") for name in names)
    assert "trainer/demo/recipe.yaml" in names
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
        name.removeprefix("trainer/demo/target/") for name in names if name.startswith("trainer/demo/target/")
    }


def test_wheel_is_small_enough_to_ship_a_target(wheel: Path) -> None:
    assert wheel.stat().st_size < 12e6


def test_no_dependency_brings_one_of_our_names() -> None:
    """Two distributions with the same top-level package overwrite each other on installation."""
    owners = packages_distributions()
    assert {name: set(owners[name]) for name in PACKAGES} == {name: {"slipstream-distill"} for name in PACKAGES}


def test_metadata_names_licence_and_command(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    text = archive.read(metadata).decode()
    assert "\nName: slipstream-distill\n" in text
    assert "\nLicense-Expression: MIT\n" in text
    assert archive.read(metadata.replace("METADATA", "licenses/LICENSE")) == (ROOT / "LICENSE").read_bytes()
    entry_points = archive.read(metadata.replace("METADATA", "entry_points.txt")).decode()
    assert "slipstream = trainer.cli:main" in entry_points


def test_every_module_imports_from_an_empty_folder(installed: Path, wheel: Path, tmp_path: Path) -> None:
    modules = [
        name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for name in names_of(wheel)
        if name.endswith(".py") and not name.endswith("__main__.py")
    ]
    assert len(modules) > 30
    script = (
        "import importlib, json, sys\n"
        "print(json.dumps({name: importlib.import_module(name).__file__ for name in sys.argv[1:]}))\n"
    )
    files = json.loads(run(installed / "python", "-c", script, *modules, cwd=tmp_path).splitlines()[-1])
    elsewhere = {name: file for name, file in files.items() if not file.startswith(str(installed.parent))}
    assert elsewhere == {}


def test_command_answers_from_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    answer = run(installed / "slipstream", "--help", cwd=tmp_path)
    assert "demo" in answer
    assert "run" in answer
    assert list(tmp_path.iterdir()) == []


def test_demo_recipe_of_the_installed_wheel_passes_its_checks(installed: Path, tmp_path: Path) -> None:
    script = "import trainer.demo, pathlib; print(pathlib.Path(trainer.demo.__file__).parent)"
    demo = Path(run(installed / "python", "-c", script, cwd=tmp_path).strip())
    assert demo.is_relative_to(installed.parent)
    command = (installed / "slipstream", "run", demo / "recipe.yaml", f"target.model={demo / 'target'}")
    checked = json.loads(run(*command, "--dry-run", "--json", cwd=tmp_path))
    assert checked["recipe"]["target"]["model"] == str(demo / "target")
    assert list(tmp_path.iterdir()) == []


def test_no_requirement_is_given_by_address() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = [*project["dependencies"], *chain.from_iterable(project["optional-dependencies"].values())]
    assert [requirement for requirement in requirements if "://" in requirement] == []
    pins = (ROOT / "infra" / "constraints.txt").read_text().splitlines()
    assert [pin for pin in pins if not pin.startswith("#") and (pin.count("==") != 1 or "+" in pin or "/" in pin)] == []
