"""What the pool makes of targets that take long to be placed; with real actors: tests/integration."""

from __future__ import annotations

import math

import pytest
import ray

from services.errors import PlacementError
from services.placement import Node
from services.target import pool as pool_module
from services.target.config import TargetConfig
from services.target.pool import TargetPool
from services.target.replica import Replica


@pytest.fixture(autouse=True)
def cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "alive_nodes", lambda: [Node({"CPU": 2.0, "GPU": 1.0}, {})])
    monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": 2.0})


def with_a_target_asked_for_long_ago(**settings: float) -> TargetPool:
    pool = TargetPool(TargetConfig(model="org/target", **settings), lambda addresses: {})
    pool._replicas = [Replica(0, actor=None, asked_s=-math.inf)]
    return pool


def test_target_that_waits_for_a_resource_ends_the_start() -> None:
    pool = with_a_target_asked_for_long_ago(num_gpus=1)
    with pytest.raises(PlacementError, match=r"targets \[0\] of 1 .* asks for 1 GPU, of the cluster's 1 are 0 free"):
        pool._is_ready(math.inf, 600.0)


def test_target_whose_process_takes_long_to_start_is_waited_for() -> None:
    assert not with_a_target_asked_for_long_ago(num_gpus=0)._is_ready(math.inf, 600.0)
