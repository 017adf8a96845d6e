"""Where a run's targets listen."""

from __future__ import annotations

from dataclasses import dataclass

from services.errors import TargetError
from services.security import Credentials
from services.target.config import ListenWhere

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Listening:
    """What a run's targets need to know to choose their address; one for all of them.

    Attributes:
        where: As the recipe says it.
        credentials: Of the run.
        shard_node: Ray's id of the node that the shard runs on: a target beside it needs no network.
    """

    where: ListenWhere
    credentials: Credentials
    shard_node: str

    def host(self, node: str, address: str) -> str:
        """What a target on a node listens on.

        Args:
            node: Ray's id of its node.
            address: That node's address in the cluster.

        Raises:
            TargetError: It shall listen on the loopback interface of a machine that the shard is not on.
        """
        is_beside = node == self.shard_node
        if self.where == "loopback" and not is_beside:
            raise TargetError(
                f"target.listen is loopback, but this target is on the node {address} and the replay shard on another, "
                "which could not reach it: set target.listen to auto, or keep the targets there by target.labels"
            )
        if is_beside and self.where != "node":
            return LOOPBACK
        return f"[{address}]" if ":" in address else address
