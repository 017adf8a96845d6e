import json
import shutil
import subprocess
from pathlib import Path

import torch

from trainer.provenance import collect_provenance, git_sha


def test_provenance_names_versions_and_command() -> None:
    provenance = collect_provenance(["slipstream", "run", "recipe.yaml"])
    assert provenance["command"] == ["slipstream", "run", "recipe.yaml"]
    assert provenance["packages"]["torch"] == torch.__version__
    assert json.loads(json.dumps(provenance)) == provenance


def test_provenance_shows_no_password() -> None:
    provenance = collect_provenance(["slipstream", "run", "recipe.yaml", "replay.redis=rediss://me:secret@host/0"])
    assert provenance["command"][3] == "replay.redis=rediss://me:***@host/0"


def test_git_sha_is_that_of_the_repository_that_tracks_the_package(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        identity = ("-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false")
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    package = tmp_path / "trainer"
    package.mkdir()
    (package / "provenance.py").touch()
    assert git_sha(package) is None  # a repository around an installed package is not its source
    git("add", "trainer/provenance.py")
    git("commit", "-q", "-m", "first")
    assert git_sha(package) == git("rev-parse", "HEAD")
    (package / "provenance.py").write_text("changed")
    assert git_sha(package) == git("rev-parse", "HEAD") + "-dirty"
    shutil.rmtree(tmp_path / ".git")
    assert git_sha(package) is None
