"""A run over two Ray nodes: what leaves the driver's node is encrypted and asks for a token or a password."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from commands import RAY_BYTES, SMALL, Command, steps_done
from ray.cluster_utils import Cluster
from victims import find
from waiting import WAIT_S

from services.errors import TargetAccessError
from services.security import is_loopback
from services.target.client import TargetClient

Start = Callable[..., Command]

STEPS = 20


@pytest.fixture
def two_nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A cluster of two nodes, both on this machine; the second one has what the first one lacks."""
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 2, "object_store_memory": RAY_BYTES, "include_dashboard": False},
    )
    try:
        cluster.add_node(num_cpus=2, object_store_memory=RAY_BYTES, resources={"elsewhere": 1})
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        yield cluster
    finally:
        cluster.shutdown()


def target_addresses(output_dir: Path) -> set[str]:
    """Addresses of targets in a run's history."""
    return set(re.findall(r'"address": ?"([^"]+)"', (output_dir / "telemetry.jsonl").read_text()))


def test_target_on_another_node_is_reached_through_tls(two_nodes: Cluster, slipstream: Start, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    import trainer

    demo = Path(trainer.__file__).parent / "demo"
    recipe.write_text((demo / "recipe.yaml").read_text())
    output_dir = tmp_path / "run"
    command = slipstream(
        "run", str(recipe), "--output-dir", str(output_dir), "--no-dashboard", "--json", *SMALL,
        f"target.model={demo / 'target'}", f"trainer.max_steps={STEPS}", "target.resources={elsewhere: 0.5}",
        "trainer.silent_s=1800",  # a rank that the test has stand still does not hang
    )  # fmt: skip
    command.wait_until(lambda: steps_done(output_dir) >= 1)
    (rank,) = find(os.getpid(), "rank")
    rank.suspend()  # the target ends with the training
    (address,) = target_addresses(output_dir)
    assert not is_loopback(address.rpartition(":")[0]), "beside the driver it would be on loopback"
    with TargetClient(address) as client, pytest.raises(TargetAccessError, match="speaks TLS"):
        client.describe(WAIT_S)
    rank.resume()
    summary = command.json()
    assert summary["steps"] == STEPS
    assert summary["ledger"]["balanced"]
    assert not [event for event in summary["events"] if event["kind"] == "target"], json.dumps(summary["events"])
    command.assert_nothing_left()
