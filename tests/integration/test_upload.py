"""What `ray job submit --working-dir .` uploads of a checkout: small, and all that a run needs."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
from ray._private.ray_constants import get_runtime_env_default_excludes
from ray._private.runtime_env.packaging import create_package

ROOT = Path(__file__).parents[2]

MOST_BYTES = 16 * 1024**2
"""The demo's target takes a third of it."""

NEEDED = {
    "infra/recipes/demo.yaml",
    "trainer/demo/target/model.safetensors",
    "trainer/__main__.py",
    "services/replay/lease.lua",
    "services/wire/target_pb2.py",
    "drafters/dspark.py",
    "evaluation/decode.py",
}

LEFT_OUT = (".git/", ".venv/", "build/", "dist/", "runs/", "slipstream-demo/", "tests/", "docs/")


@pytest.fixture(scope="module")
def uploaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """Size of each file in the upload, by name."""
    package = tmp_path_factory.mktemp("upload") / "package.zip"
    create_package(str(ROOT), package, include_gitignore=True, excludes=get_runtime_env_default_excludes())
    assert package.stat().st_size < MOST_BYTES
    with zipfile.ZipFile(package) as archive:
        return {item.filename: item.file_size for item in archive.infolist()}


def test_upload_has_all_that_a_run_needs(uploaded: dict[str, int]) -> None:
    assert NEEDED - uploaded.keys() == set()
    demo = (ROOT / "trainer" / "demo" / "recipe.yaml").stat().st_size
    assert uploaded["infra/recipes/demo.yaml"] == demo, "the link's content, not the link"


def test_upload_leaves_out_what_no_run_needs(uploaded: dict[str, int]) -> None:
    assert [name for name in uploaded if name.startswith(LEFT_OUT)] == []
    assert [name for name in uploaded if "__pycache__" in name or name.endswith(".egg-info/PKG-INFO")] == []
