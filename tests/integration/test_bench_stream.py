"""The streaming benchmark at a small size: what it reports is there and adds up. Speed is nobody's business here."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.errors import UsageError
from trainer.bench.starvation import measure_starvation
from trainer.bench.stream import Way, choose_ways, measure_stream
from trainer.bench.stream_parts import SampleShape

SMALL = SampleShape(num_tokens=64, layer_ids=(0, 1), hidden_size=32)
WAYS = [Way("redis", "bf16", 1), Way("redis", "fp8_e4m3", 2), Way("shm", "bf16", 2)]


def ignore(news: str) -> None:
    """Nobody watches."""


def test_every_way_and_yardstick_is_measured(tmp_path: Path) -> None:
    result = measure_stream(ignore, ways=WAYS, rounds=2, num_samples=4, disk=tmp_path, shape=SMALL)
    for yardstick in ("tcp_loopback", "grpc_hop", "redis_set", "redis_get", "disk_way", "cold_disk_way"):
        assert result[f"{yardstick}_mb_s"] > 0
    assert [(way["tier"], way["wire_dtype"], way["shards"]) for way in result["results"]] == WAYS
    for way in result["results"]:
        assert way["end_to_end_mb_s"] > 0
        assert set(way["cpu_s_per_gb"]) == {"target", "shard", "redis", "trainer"}
        assert 0 < way["peak_bytes"] <= way["capacity_bytes"]
    assert list(tmp_path.iterdir()) == []


def test_starvation_counts_every_step_and_keeps_within_capacity() -> None:
    result = measure_starvation(ignore, SMALL, num_steps=5, step_s=0.05)
    assert 0 <= result["wait_fraction"] < 1
    assert 0 < result["peak_bytes"] <= result["capacity_bytes"]


def test_ways_are_all_combinations() -> None:
    assert len(choose_ways(tiers=["redis"])) == len(choose_ways(tiers=["redis"], shards=[1])) * 2
    assert choose_ways(["redis"], ["bf16"], [1]) == [Way("redis", "bf16", 1)]


@pytest.mark.parametrize("unknown", [{"tiers": ["disk"]}, {"wire_dtypes": ["int8"]}, {"shards": [0]}])
def test_unknown_way_is_refused(unknown: dict[str, list[str]]) -> None:
    with pytest.raises(UsageError):
        choose_ways(**unknown)
