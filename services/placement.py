"""What an actor asks of a Ray cluster, resources and node labels, and why the cluster does not place it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

SMALLEST_AMOUNT = 1e-4
"""Ray counts resources in ten-thousandths."""

_WORD = r"[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?"
_SELECTOR = re.compile(rf"(?P<negated>!)?(?:in\((?P<several>{_WORD}(?:, ?{_WORD})*)\)|(?P<one>{_WORD}))")
_LABEL = re.compile(rf"(?:{_WORD}/)?{_WORD}")


def _check_gpus(amount: float) -> float:
    if amount > 1 and amount != int(amount):
        raise ValueError(f"{amount:g} is neither a whole number nor a part of one GPU")
    return _check_amount(amount)


def _check_amount(amount: float) -> float:
    if 0 < amount < SMALLEST_AMOUNT:
        raise ValueError(f"{amount:g} is less than Ray's smallest amount of a resource, {SMALLEST_AMOUNT:g}")
    return amount


def _check_resources(amounts: dict[str, float]) -> dict[str, float]:
    for name, amount in amounts.items():
        if name in ("CPU", "GPU"):
            raise ValueError(f"{name}s are asked for by num_{name.lower()}s, not among resources")
        if not amount > 0:
            raise ValueError(f"{name}: {amount:g} must be above 0; leave it out if it is not needed")
        _check_amount(amount)
    return amounts


def _check_labels(labels: dict[str, str]) -> dict[str, str]:
    for key, selector in labels.items():
        if not _LABEL.fullmatch(key):
            raise ValueError(f"{key!r} is no name of a node label")
        if not _SELECTOR.fullmatch(selector):
            raise ValueError(f"{key}: {selector!r} must be a value, !value, in(a, b) or !in(a, b)")
    return labels


class PlacementConfig(BaseModel):
    """Where the actors of a recipe's section run; what `target` and `trainer` have in common."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    num_gpus: Annotated[float, AfterValidator(_check_gpus)] = Field(
        1.0, ge=0, description="GPUs of each actor; fractions share a GPU, 0 runs on the CPU"
    )
    num_cpus: Annotated[float, AfterValidator(_check_amount)] = Field(
        0.0, ge=0, description="CPUs that Ray reserves for each actor"
    )
    resources: Annotated[dict[str, float], AfterValidator(_check_resources)] = Field(
        {}, description="custom resources of the cluster that each actor takes: {name: amount}"
    )
    labels: Annotated[dict[str, str], AfterValidator(_check_labels)] = Field(
        {}, description="labels of the nodes that may hold the actors: {key: value, !value, in(a, b) or !in(a, b)}"
    )

    @property
    def ask(self) -> Ask:
        """What each actor of this section asks for."""
        return Ask(num_gpus=self.num_gpus, num_cpus=self.num_cpus, resources=self.resources, labels=self.labels)


@dataclass(frozen=True)
class Ask:
    """What one actor asks of the node that shall hold it."""

    num_gpus: float = 0.0
    num_cpus: float = 0.0
    resources: Mapping[str, float] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)

    @property
    def amounts(self) -> dict[str, float]:
        """Amount of each resource by Ray's name for it; those of which it needs nothing are left out."""
        wanted = {"GPU": self.num_gpus, "CPU": self.num_cpus, **self.resources}
        return {name: amount for name, amount in wanted.items() if amount}

    def options(self) -> dict[str, Any]:
        """Options of a Ray actor."""
        return {
            "num_gpus": self.num_gpus,
            "num_cpus": self.num_cpus,
            "resources": dict(self.resources),
            "label_selector": dict(self.labels),
        }

    def fits(self, node: Node) -> bool:
        """Whether a node could hold the actor if nothing else ran on it."""
        return self._may_be_on(node) and all(
            node.resources.get(name, 0.0) >= amount for name, amount in self.amounts.items()
        )

    def _may_be_on(self, node: Node) -> bool:
        return all(label_matches(selector, node.labels.get(key)) for key, selector in self.labels.items())

    def why_never(self, nodes: Sequence[Node]) -> str:
        """Why no node could hold the actor, were all of them idle; empty if one could."""
        if any(self.fits(node) for node in nodes):
            return ""
        allowed = [node for node in nodes if self._may_be_on(node)]
        if not allowed:
            wanted = ", ".join(f"{key}={selector}" for key, selector in self.labels.items())
            return f"a node with label {wanted}, and the cluster has none"
        where = f"nodes with {', '.join(f'{key}={value}' for key, value in self.labels.items())} have"
        holder = where if self.labels else "the cluster has"
        for name, amount in self.amounts.items():
            held = [node.resources.get(name, 0.0) for node in allowed]
            if sum(held) < amount:
                return f"{amount:g} {name}, {holder} {sum(held):g} in all"
            if max(held) < amount:
                return f"{amount:g} {name}, and no single node has more than {max(held):g}"
        wanted = " and ".join(f"{amount:g} {name}" for name, amount in self.amounts.items())
        return f"{wanted}, and no single node has all of that"

    def why_not_now(self, nodes: Sequence[Node], free: Mapping[str, float]) -> str:
        """The resource that the actor waits for; empty if there seems to be enough of everything.

        Args:
            nodes: Of the cluster.
            free: What is not taken, over the whole cluster.
        """
        if never := self.why_never(nodes):
            return never
        for name, amount in self.amounts.items():
            if free.get(name, 0.0) < amount:
                total = sum(node.resources.get(name, 0.0) for node in nodes)
                return f"{amount:g} {name}, of the cluster's {total:g} are {free.get(name, 0.0):g} free"
        return ""


@dataclass(frozen=True)
class Node:
    """One node of the cluster: what it has in all, and its labels."""

    resources: Mapping[str, float]
    labels: Mapping[str, str]


def label_matches(selector: str, value: str | None) -> bool:
    """Whether a node's label satisfies a selector; value None is a node without that label."""
    match = _SELECTOR.fullmatch(selector)
    assert match is not None, "checked with the recipe"
    allowed = re.split(", ?", match["several"]) if match["several"] else [match["one"]]
    return (value in allowed) != bool(match["negated"])


def alive_nodes() -> list[Node]:
    """The nodes of the cluster that this process is attached to."""
    import ray

    return read_nodes(ray.nodes())


def read_nodes(nodes: Iterable[Mapping[str, Any]]) -> list[Node]:
    """The living ones of `ray.nodes()`."""
    return [Node(node["Resources"], node["Labels"]) for node in nodes if node["Alive"]]


def this_node() -> str:
    """Ray's id of the node that this process runs on."""
    import ray

    node_id: str = ray.get_runtime_context().get_node_id()
    return node_id


def on_this_node() -> Any:
    """The scheduling strategy of an actor that must run beside this process, there again after a restart."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(this_node(), soft=False)


def node_address() -> str:
    """This machine's address in the cluster."""
    import ray

    address: str = ray.util.get_node_ip_address()
    return address


def address_for_others() -> str | None:
    """This machine's address if the cluster has other nodes, else None."""
    return node_address() if len(alive_nodes()) > 1 else None
