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

# What may import torch: it handles tensors, or starts the actors that do. Everything else starts fast and stays small:
# the command line and its checks, coordinator, shard, table, the client of the targets. Most of drafters is models, so
# there the exceptions are named.
WITH_TORCH = {
    "services.buffers",
    "services.codec",
    "services.fp8",
    "services.replay.reader",
    "services.target.engine",
    "services.target.generation",
    "services.target.packing",
    "services.target.server",
    "services.target.tap",
    "evaluation.accept",
    "evaluation.batch_decoder",
    "evaluation.bench.eval",
    "evaluation.bench.train",
    "evaluation.compare.decoding",
    "evaluation.confidence.decoding",
    "evaluation.confidence.measuring",
    "evaluation.decode",
    "evaluation.evaluator",
    "evaluation.fitting",
    "evaluation.loading",
    "evaluation.lossless",
    "evaluation.ragged_target",
    "evaluation.self_check",
    "evaluation.sample_decoder",
    "evaluation.speedup",
    "trainer.assembly",
    "trainer.bench.limits",
    "trainer.bench.starvation",
    "trainer.bench.stream",
    "trainer.bench.synthetic",
    "trainer.collate",
    "trainer.distributed",
    "trainer.export",
    "trainer.evaluations",
    "trainer.job",
    "trainer.loading",
    "trainer.loop",
    "trainer.rank",
    "trainer.saving",
    "trainer.training",
    "trainer.training_state",
}
DRAFTERS_WITHOUT_TORCH = {
    "drafters",
    "drafters.config",
    "drafters.families",
    "drafters.families.dense",
    "drafters.registry",
    "drafters.vocabulary",
}

# Ranks alone pay for deepspeed.
WITH_DEEPSPEED = {"trainer.distributed", "trainer.saving", "trainer.training_state"}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {
    module_name(path): path
    for package in MAY_IMPORT
    for path in sorted((ROOT / package).rglob("*.py"))
    if path.name != "__main__.py"
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


def importers(library: str) -> set[str]:
    """Our modules that name a library in an import."""
    return {
        name
        for name, path in MODULES.items()
        for _, what in imported(path.read_text(encoding="utf-8"))
        if what.partition(".")[0] == library
    }


def test_only_trainer_ranks_import_deepspeed() -> None:
    assert importers("deepspeed") <= WITH_DEEPSPEED


def test_services_import_transformers_in_the_engine_alone() -> None:
    assert {name for name in importers("transformers") if name.startswith("services.")} <= {
        "services.target.engine",
        "services.target.generation",
    }


def test_proto_is_left_to_proto_plus() -> None:
    """Ray's dependencies install a top-level `proto`; ours are `services.wire`."""
    assert not (ROOT / "proto" / "__init__.py").exists()
    assert importers("proto") == set()


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


def test_modules_named_here_exist() -> None:
    assert sorted((WITH_TORCH | DRAFTERS_WITHOUT_TORCH | WITH_DEEPSPEED) - MODULES.keys()) == []


@pytest.mark.parametrize("package", ["services", "evaluation", "trainer"])
def test_torch_is_imported_only_where_tensors_are(package: str) -> None:
    modules = [name for name in MODULES if name.partition(".")[0] == package and name not in WITH_TORCH]
    assert first_heavy(modules) == ""


def test_drafters_settings_import_no_torch() -> None:
    assert first_heavy(sorted(DRAFTERS_WITHOUT_TORCH)) == ""
