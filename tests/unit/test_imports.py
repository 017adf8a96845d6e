"""Imports go one way, and what must start fast or stay small imports no torch.

trainer → evaluation → {drafters, services}; drafters and services never import each other; deepspeed is the trainer
ranks' alone.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

MAY_IMPORT = {
    "drafters": {"drafters"},
    "services": {"services"},
    "evaluation": {"evaluation", "drafters", "services"},
    "trainer": {"trainer", "evaluation", "drafters", "services"},
}

HEAVY = ("torch", "transformers", "deepspeed")

# Everything in services is torch-free, but for what touches tensors.
SERVICES_WITH_TORCH = {
    "services.codec",
    "services.replay.reader",
    "services.target.engine",
    "services.target.server",
    "services.target.tap",
}

# Elsewhere tensors are the rule, so what the driver and `--help` need is named.
TORCH_FREE = {
    "drafters",
    "drafters.config",
    "drafters.registry",
    "evaluation",
    "evaluation.config",
    "evaluation.report",
    "trainer",
    "trainer.cli",
    "trainer.recipe",
    "trainer.preparation",
    "trainer.output",
}

# Ranks alone pay for deepspeed.
MAY_IMPORT_DEEPSPEED = {"trainer.rank", "trainer.loop", "trainer.distributed", "trainer.checkpoint"}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {
    module_name(path): path
    for package in MAY_IMPORT
    for path in sorted((ROOT / package).rglob("*.py"))
    if "__pycache__" not in path.parts
}


def imported(source: str) -> Iterator[tuple[int, str]]:
    """Line and absolute name of every module that a source names, wherever the import stands.

    Relative imports cannot leave their package, so they are no concern here.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.lineno, node.module
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value


def wrong_way(package: str, source: str) -> list[str]:
    """Imports of our own packages that `package` may not make, as `line: module`."""
    return [
        f"{line}: {name}"
        for line, name in imported(source)
        if (top := name.partition(".")[0]) in MAY_IMPORT and top not in MAY_IMPORT[package]
    ]


@pytest.mark.parametrize(
    ("package", "source", "found"),
    [
        ("drafters", "import torch\nimport services.codec", ["2: services.codec"]),
        ("services", "def f():\n    from drafters import build_drafter", ["2: drafters"]),
        ("services", "if TYPE_CHECKING:\n    from trainer.recipe import Recipe", ["2: trainer.recipe"]),
        ("services", "importlib.import_module('evaluation.metrics')", ["1: evaluation.metrics"]),
        ("services", "import_module('.engine', __name__)\nfrom . import config", []),
        ("evaluation", "import drafters.config, trainer.recipe as r", ["1: trainer.recipe"]),
        ("trainer", "import evaluation, drafters, services, trainer", []),
    ],
)
def test_wrong_way_finds_imports_wherever_they_stand(package: str, source: str, found: list[str]) -> None:
    assert wrong_way(package, source) == found


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_go_one_way(package: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{item}"
        for name, path in MODULES.items()
        if name.partition(".")[0] == package
        for item in wrong_way(package, path.read_text(encoding="utf-8"))
    ]
    assert wrong == []


def test_only_trainer_ranks_import_deepspeed() -> None:
    importers = {
        name
        for name, path in MODULES.items()
        for _, what in imported(path.read_text(encoding="utf-8"))
        if what.partition(".")[0] == "deepspeed"
    }
    assert importers <= MAY_IMPORT_DEEPSPEED


def test_services_import_transformers_in_the_engine_alone() -> None:
    importers = {
        name
        for name, path in MODULES.items()
        for _, what in imported(path.read_text(encoding="utf-8"))
        if what.partition(".")[0] == "transformers" and name.startswith("services")
    }
    assert importers <= {"services.target.engine"}


def test_no_module_takes_protos_name() -> None:
    """`proto` is proto-plus, which ray brings; ours are `services.wire`."""
    assert not (ROOT / "proto" / "__init__.py").exists()
    assert [name for name, path in MODULES.items() for _, what in imported(path.read_text()) if what == "proto"] == []


def first_heavy(modules: list[str]) -> str:
    """Import modules one after another in a fresh interpreter; the first that brings in something heavy, or ''."""
    script = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module(name)\n"
        f"    if heavy := [heavy for heavy in {HEAVY} if heavy in sys.modules]:\n"
        "        sys.exit(print(f'{name} imports {heavy[0]}'))\n"
    )
    done = subprocess.run([sys.executable, "-c", script, *modules], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_first_heavy_finds_torch() -> None:
    assert first_heavy(["services.contracts", "services.target.tap"]) == "services.target.tap imports torch"


def test_torch_free_modules_exist() -> None:
    assert MODULES.keys() >= TORCH_FREE | SERVICES_WITH_TORCH | MAY_IMPORT_DEEPSPEED


def test_services_import_no_torch_but_where_tensors_are() -> None:
    services = [name for name in MODULES if name.partition(".")[0] == "services"]
    assert first_heavy([name for name in services if name not in SERVICES_WITH_TORCH]) == ""


def test_command_line_and_driver_checks_import_no_torch() -> None:
    assert first_heavy(sorted(TORCH_FREE)) == ""
