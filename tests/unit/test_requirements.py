from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
WIRE = ROOT / "services" / "wire"


def lower_bounds() -> dict[str, str]:
    """The lower bound of each requirement, the development extra's included."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    matches = (re.match(r"([\w-]+)(?:\[.*\])?>=([\d.]+)", requirement) for requirement in requirements)
    return {match[1]: match[2] for match in matches if match}


def test_requirements_are_not_older_than_what_the_stubs_were_generated_with() -> None:
    """The generated modules refuse an older runtime when they are imported."""
    protobuf = re.search(r"Protobuf Python Version: ([\d.]+)", (WIRE / "target_pb2.py").read_text())
    grpcio = re.search(r"GRPC_GENERATED_VERSION = '([\d.]+)'", (WIRE / "target_pb2_grpc.py").read_text())
    assert protobuf is not None
    assert grpcio is not None
    bounds = lower_bounds()
    assert bounds["protobuf"] == protobuf[1]
    grpc_packages = ("grpcio", "grpcio-health-checking", "grpcio-reflection", "grpcio-tools")
    assert {bounds[name] for name in grpc_packages} == {grpcio[1]}
