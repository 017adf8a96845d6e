from __future__ import annotations

from services.prompts.routing import Router


def test_capture_goes_where_the_fewest_bytes_are():
    router = Router(3, by_plan=False)
    router.put(0, 0, 10)
    router.put(1, 1, 30)
    router.put(2, 2, 20)
    assert router.choose(3, [1, 1, 1]) == 0
    router.put(3, 0, 15)
    assert router.choose(4, [1, 1, 1]) == 2
    router.remove(1)
    assert router.choose(4, [1, 1, 1]) == 1
    router.resize(3, 5)
    router.put(4, 1, 15)
    assert [router.num_bytes(shard) for shard in range(3)] == [15, 15, 20]
    assert router.choose(5, [1, 1, 1]) == 0


def test_queue_without_room_is_passed_over():
    router = Router(2, by_plan=False)
    router.put(0, 1, 10)
    assert router.choose(1, [0, 1]) == 1
    assert router.choose(1, [0, -1]) is None


def test_plan_alone_says_where_deterministic_captures_go():
    router = Router(2, by_plan=True)
    router.put(0, 0, 1000)
    assert [router.choose(capture, [1, 1]) for capture in (2, 3)] == [0, 1]
    assert router.choose(2, [0, 5]) is None, "the captures behind it wait as well"


def test_captures_of_a_shard_are_those_that_are_there_now():
    router = Router(2, by_plan=False)
    for capture, shard in ((5, 0), (3, 0), (4, 1)):
        router.put(capture, shard, 1)
    router.put(5, 1, 1)
    router.remove(4)
    router.remove(4)
    router.resize(4, 100)
    assert (router.on(0), router.on(1)) == ([3], [5])
    assert (router.num_bytes(0), router.num_bytes(1)) == (1, 1)
