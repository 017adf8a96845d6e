"""Where a checkpoint comes from: code version, package versions, machine, command line."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from services.replay.urls import hide_passwords

PACKAGES = ("slipstream-distill", "torch", "transformers", "deepspeed", "ray", "grpcio", "redis", "safetensors")
"""Packages whose versions can change what a run computes."""


def collect_provenance(command: Sequence[str]) -> dict[str, Any]:
    """What `provenance.json` holds.

    Args:
        command: The command line of the run; passwords in it are hidden.
    """
    return {
        "command": hide_passwords(command),
        "git_sha": git_sha(Path(__file__).resolve().parent),
        "packages": {name: metadata.version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


def git_sha(folder: Path) -> str | None:
    """Commit of the repository that tracks this package, with "-dirty" where files differ from it.

    None for an installed wheel, also where it is installed below some other repository, and where there is no git.
    """
    try:
        tracked = _git(folder, "ls-files", "--", "provenance.py")
        if not tracked:
            return None
        return _git(folder, "describe", "--always", "--dirty", "--abbrev=40", "--exclude", "*")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout.strip()
