from __future__ import annotations

import pytest
from pydantic import ValidationError

from services.replay.config import ReplayConfig

A, B = "redis://:a,b@one:6379/0", "rediss://user:x@two:6380/0"


def test_capacity_is_shared_equally():
    config = ReplayConfig.model_validate({"shards": 3, "capacity": 1001})
    assert (config.shard_capacity, config.of_one_shard().capacity, config.of_one_shard().shards) == (333, 333, 1)
    assert config.urls == (), "embedded ones"


@pytest.mark.parametrize("servers", [[A, B], f"{A},{B}", f"{A}, {B}"])
def test_servers_are_given_as_a_list_or_with_commas(servers: object):
    config = ReplayConfig.model_validate({"shards": 2, "redis": servers})
    assert config.urls == (A, B)
    assert config.model_dump()["redis"] == "redis://@one:6379/0,rediss://user@two:6380/0"
    assert ReplayConfig.model_validate(config.model_dump()).shards == 2


@pytest.mark.parametrize(
    ("shards", "servers", "says"),
    [
        (1, [A, B], "names 2 servers and replay.shards is 1.*Set replay.shards to 2, or list 1"),
        (3, A, "names 1 servers and replay.shards is 3"),
        (2, [A, A], "names a server twice"),
        (0, "embedded", "greater than or equal to 1"),
        (65, "embedded", "less than or equal to 64"),
    ],
)
def test_number_of_servers_must_be_that_of_the_shards(shards: int, servers: object, says: str):
    with pytest.raises(ValidationError, match=says) as refused:
        ReplayConfig.model_validate({"shards": shards, "redis": servers})
    assert "user:x" not in str(refused.value.errors()[0]["msg"])
