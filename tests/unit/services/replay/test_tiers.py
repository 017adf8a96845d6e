"""Which tier a run has, and how everyone who connects hears of it."""

from __future__ import annotations

import pytest

from services.errors import ReplayError
from services.replay.arena import Arena, ArenaPlace
from services.replay.tiers import choose_tier
from services.replay.urls import reachable, safe_url, split_arena, with_arena

PLACE = ArenaPlace(path="/proc/7/fd/9", device=26, inode=12345, capacity_bytes=4 * 1024**3)


def room(capacity_bytes: int) -> str:
    return ""


def no_room(capacity_bytes: int) -> str:
    return f"{capacity_bytes} bytes are too many"


def test_tier_that_the_recipe_names_is_taken() -> None:
    assert choose_tier("redis", 1, on_one_host=True, why_not=room) == (False, "")
    assert choose_tier("shm", 1, on_one_host=False, why_not=no_room) == (True, "")


def test_auto_takes_shared_memory_on_one_host_with_room() -> None:
    choice = choose_tier("auto", 1, on_one_host=True, why_not=room)
    assert choice.is_shared_memory
    assert "takes shm" in choice.reason


def test_auto_takes_redis_and_says_why() -> None:
    apart = choose_tier("auto", 1, on_one_host=False, why_not=room)
    assert not apart.is_shared_memory
    assert "several nodes" in apart.reason
    small = choose_tier("auto", 77, on_one_host=True, why_not=no_room)
    assert not small.is_shared_memory
    assert "77 bytes are too many" in small.reason


@pytest.mark.parametrize(
    "url",
    [
        "unix:///tmp/slip-x/redis.sock",
        "unix://:p%3F@/tmp/slip-x/redis.sock?tcp=10.0.0.1:6379",
        "rediss://user:se?cret@host:6380/0",
        "redis://host:6379/0?db=1",
    ],
)
def test_arena_goes_with_any_url_and_leaves_it_as_it_was(url: str) -> None:
    assert split_arena(with_arena(url, PLACE.text)) == (url, PLACE.text)
    assert split_arena(url) == (url, None)
    assert "se?cret" not in safe_url(with_arena(url, PLACE.text))
    assert reachable(split_arena(with_arena(url, PLACE.text))[0]) == reachable(url)


def test_place_is_the_same_after_its_way_through_a_url() -> None:
    assert ArenaPlace.parse(PLACE.text) == PLACE
    with Arena(4096) as arena:
        assert ArenaPlace.parse(arena.place.text) == arena.place


@pytest.mark.parametrize("text", ["", "x", "/etc/passwd:1:2:3", "/proc/1/fd/2:1:2", "/proc/1/fd/2:1:2:3:4"])
def test_place_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ReplayError, match=r"leave arena= out of replay\.redis"):
        ArenaPlace.parse(text)
