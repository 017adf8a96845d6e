"""What only the table in Redis can do: lose its scripts, race, leave keys behind. And the registry."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from replaying import JOB_BYTES, SIGNATURE, insert, lease, make_job, make_sample

from services.errors import TableLostError
from services.replay.connect import Client, connect
from services.replay.embedded import EmbeddedRedis
from services.replay.registry import TargetRegistry
from services.replay.table import RedisTable


@pytest.fixture(scope="module")
def redis_client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    with EmbeddedRedis.start(tmp_path_factory.mktemp("redis"), 1_000_000) as embedded:
        yield connect(embedded.url)


@pytest.fixture
def table(redis_client: Client) -> Iterator[RedisTable]:
    table = RedisTable(redis_client, "run")
    table.create(4 * JOB_BYTES, SIGNATURE, max_times_sampled=1)
    yield table
    table.destroy()
    assert redis_client.keys("run:*") == []


def test_lost_table_is_not_made_by_what_is_asked_of_it(redis_client: Client) -> None:
    table = RedisTable(redis_client, "nothing")
    for call in (
        table.seal,
        lambda: table.commit(make_sample(make_job(0)), 0.0),
        lambda: table.set_generation(1),
        lambda: table.update_priorities({0: 0.5}),
    ):
        with pytest.raises(TableLostError):
            call()
    assert redis_client.keys("nothing*") == []


def test_used_up_sample_leaves_no_key_of_its_own(table: RedisTable, redis_client: Client) -> None:
    empty = set(redis_client.keys("run:*"))
    insert(table, make_job(7))
    assert sorted(redis_client.keys("run:chunk:*")) == [b"run:chunk:7:0:0", b"run:chunk:7:0:1"]
    table.ack(lease(table), 0, 0.0)
    table.drain_outcomes()
    assert set(redis_client.keys("run:*")) == empty


def test_scripts_come_back_after_redis_forgot_them(table: RedisTable, redis_client: Client) -> None:
    table.info()
    redis_client.script_flush()
    assert table.info().num_ready == 0


def test_registry_forgets_targets_that_are_not_published_again(table: RedisTable, redis_client: Client) -> None:
    registry = TargetRegistry(redis_client, "run")
    assert registry.live(0.0, 1e9) == []
    registry.publish(["b:2", "a:1"], 100.0)
    assert registry.live(104.0, 5.0) == ["a:1", "b:2"]
    assert registry.live(106.0, 5.0) == []
    registry.publish(["b:2"], 105.0)
    assert registry.live(106.0, 1e9) == ["b:2"]
    registry.publish([], 106.0)
    assert registry.live(106.0, 1e9) == []
