from __future__ import annotations

import pytest

from services.errors import TargetError
from services.security import Credentials
from services.target.config import ListenWhere
from services.target.listening import Listening


def host(where: ListenWhere, node: str, address: str = "10.0.0.1") -> str:
    return Listening(where, Credentials(), "the shard's node").host(node, address)


def test_target_beside_the_shard_needs_no_network() -> None:
    assert host("auto", "the shard's node") == "127.0.0.1"
    assert host("loopback", "the shard's node") == "127.0.0.1"
    assert host("node", "the shard's node") == "10.0.0.1"


def test_target_elsewhere_listens_on_the_address_of_its_node() -> None:
    assert host("auto", "another") == "10.0.0.1"
    assert host("node", "another") == "10.0.0.1"
    assert host("auto", "another", "fd00::1") == "[fd00::1]"


def test_loopback_of_another_machine_is_refused() -> None:
    with pytest.raises(TargetError, match=r"is on the node 10\.0\.0\.1 and the replay shard on another"):
        host("loopback", "another")
