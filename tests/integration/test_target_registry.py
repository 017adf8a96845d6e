"""The quarantine of targets, from the shard that declares it to the driver that ends it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from services.replay.connect import Client, connect
from services.replay.embedded import EmbeddedRedis
from services.replay.registry import TargetRegistry


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    with EmbeddedRedis.start(tmp_path_factory.mktemp("redis"), 1_000_000) as running:
        yield connect(running.url)


@pytest.fixture
def registry(client: Client) -> Iterator[TargetRegistry]:
    yield TargetRegistry(client, "run")
    client.flushdb()


def test_quarantined_target_is_asked_by_nobody_and_the_driver_hears_why(registry: TargetRegistry) -> None:
    assert registry.publish(["a:1", "b:2"], 100.0) == {}
    assert registry.quarantine("a:1", "it gave NaN")
    assert not registry.quarantine("a:1", "another reason"), "the first reason stays"
    assert registry.live(100.0, 5.0) == ["b:2"]
    assert registry.published(100.0, 5.0) == ["a:1", "b:2"]
    assert registry.publish(["a:1", "b:2"], 101.0) == {"a:1": "it gave NaN"}
    assert registry.live(101.0, 5.0) == ["b:2"], "until its process has ended"


def test_quarantine_ends_when_the_address_is_published_no_more(registry: TargetRegistry) -> None:
    registry.publish(["a:1"], 100.0)
    registry.quarantine("a:1", "it gave NaN")
    assert registry.publish([], 101.0) == {}
    assert registry.publish(["a:1"], 102.0) == {}
    assert registry.live(102.0, 5.0) == ["a:1"]


def test_target_that_serves_no_more_is_not_quarantined(registry: TargetRegistry) -> None:
    registry.publish(["a:1"], 100.0)
    assert not registry.quarantine("gone:1", "it gave NaN")
    assert registry.publish(["a:1", "gone:1"], 101.0) == {}
