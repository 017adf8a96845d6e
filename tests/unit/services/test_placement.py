from __future__ import annotations

import pytest
from pydantic import ValidationError

from services.placement import Ask, Node, PlacementConfig, label_matches, read_nodes

HEAD = Node({"CPU": 8.0, "node:10.0.0.1": 1.0}, {"zone": "a"})
GPUS = Node({"CPU": 16.0, "GPU": 2.0, "fpga": 1.0}, {"zone": "b", "ray.io/accelerator-type": "H100"})
MORE_GPUS = Node({"CPU": 16.0, "GPU": 2.0}, {"zone": "b"})
NODES = [HEAD, GPUS, MORE_GPUS]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"num_gpus": 1.5}, "1.5 is neither a whole number nor a part of one GPU"),
        ({"num_gpus": -1}, "greater than or equal to 0"),
        ({"num_cpus": 0.00001}, "less than Ray's smallest amount"),
        ({"resources": {"GPU": 1}}, "GPUs are asked for by num_gpus"),
        ({"resources": {"fpga": 0}}, "fpga: 0 must be above 0"),
        ({"resources": {"fpga": float("nan")}}, "resources.fpga\n  Input should be a finite number"),
        ({"labels": {"zone": "a b"}}, "zone: 'a b' must be a value"),
        ({"labels": {"-": "a"}}, "'-' is no name of a node label"),
    ],
)
def test_setting_that_ray_would_refuse_is_named(settings: dict[str, object], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        PlacementConfig.model_validate(settings)


def test_ask_becomes_the_options_of_an_actor() -> None:
    config = PlacementConfig(num_gpus=0.25, num_cpus=2, resources={"fpga": 1}, labels={"ray.io/market-type": "!spot"})
    assert config.ask.options() == {
        "num_gpus": 0.25,
        "num_cpus": 2,
        "resources": {"fpga": 1},
        "label_selector": {"ray.io/market-type": "!spot"},
    }
    assert config.ask.amounts == {"GPU": 0.25, "CPU": 2, "fpga": 1}
    assert PlacementConfig(num_gpus=0).ask.amounts == {}


@pytest.mark.parametrize(
    ("ask", "says"),
    [
        (Ask(num_gpus=2, resources={"fpga": 1}), ""),
        (Ask(num_gpus=0.5, labels={"zone": "b"}), ""),
        (Ask(), ""),
        (Ask(num_gpus=5), "5 GPU, the cluster has 4 in all"),
        (Ask(num_gpus=3), "3 GPU, and no single node has more than 2"),
        (Ask(resources={"tpu": 1}), "1 tpu, the cluster has 0 in all"),
        (Ask(num_gpus=1, labels={"zone": "a"}), "1 GPU, nodes with zone=a have 0 in all"),
        (Ask(labels={"zone": "c"}), "a node with label zone=c, and the cluster has none"),
        (Ask(num_gpus=2, num_cpus=8, resources={"fpga": 1}, labels={"zone": "a"}), "2 GPU, nodes with zone=a have 0"),
    ],
)
def test_why_never_names_what_the_cluster_lacks(ask: Ask, says: str) -> None:
    assert ask.why_never(NODES).startswith(says)
    assert bool(ask.why_never(NODES)) == bool(says)


def test_why_never_without_one_node_that_has_everything() -> None:
    nodes = [Node({"fpga": 1.0}, {}), Node({"GPU": 1.0}, {})]
    assert (
        Ask(num_gpus=1, resources={"fpga": 1}).why_never(nodes)
        == "1 GPU and 1 fpga, and no single node has all of that"
    )


def test_why_not_now_names_what_others_hold() -> None:
    ask = Ask(num_gpus=1, num_cpus=1)
    assert ask.why_not_now(NODES, {"GPU": 0.5, "CPU": 30}) == "1 GPU, of the cluster's 4 are 0.5 free"
    assert ask.why_not_now(NODES, {"GPU": 1.0, "CPU": 30}) == ""
    assert ask.why_not_now([HEAD], {"CPU": 8}) == "1 GPU, the cluster has 0 in all"


@pytest.mark.parametrize(
    ("selector", "value", "matches"),
    [
        ("a", "a", True),
        ("a", "b", False),
        ("a", None, False),
        ("!a", "b", True),
        ("!a", "a", False),
        ("!a", None, True),
        ("in(a, b)", "b", True),
        ("in(a,b)", "c", False),
        ("!in(a, b)", "b", False),
        ("!in(a, b)", "c", True),
    ],
)
def test_label_matches_as_ray_does(selector: str, value: str | None, matches: bool) -> None:
    assert label_matches(selector, value) is matches


def test_dead_nodes_hold_nothing() -> None:
    nodes = [
        {"Alive": True, "Resources": {"CPU": 1.0}, "Labels": {"zone": "a"}},
        {"Alive": False, "Resources": {"GPU": 1.0}, "Labels": {}},
    ]
    assert read_nodes(nodes) == [Node({"CPU": 1.0}, {"zone": "a"})]
