"""A group of ranks as real Ray actors: one that dies is told from those that fail because of it."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import ray
from waiting import WAIT_S, wait_until

from services.errors import NotBegunError, PartDiedError
from trainer import group as group_module
from trainer.cluster import result_of, start_local_ray, start_part, wait_started
from trainer.figures import TrainResult
from trainer.group import RankGroup

RESULT = TrainResult(first_step=1, steps=1, final_loss=None, tokens=0, first_fill_s=0.0, wait_fraction=None)


class StandInRank:
    """Does what it is told instead of training."""

    def __init__(self, fate: str) -> None:
        self.fate = fate

    def open_store(self) -> str:
        return "nowhere:0"

    def train(self, store: str) -> TrainResult:
        if self.fate == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.fate == "loses its peer":
            raise RuntimeError("connection closed by peer")
        return RESULT

    def process(self) -> int:
        return os.getpid()


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    here = sys.modules[__name__]
    ray.cloudpickle.register_pickle_by_value(here)  # workers cannot import a test
    start_local_ray(num_cpus=2)
    yield
    ray.shutdown()
    ray.cloudpickle.unregister_pickle_by_value(here)


def begin(*fates: str) -> RankGroup:
    group = RankGroup([start_part(StandInRank, fate) for fate in fates])
    wait_started(group.parts)
    group.begin()
    return group


def take_all(group: RankGroup) -> None:
    while group.calls:
        done, _ = ray.wait(group.calls, num_returns=1, timeout=WAIT_S)
        group.take(done[0])


def test_ranks_that_finish_hand_in_their_results():
    group = begin("trains", "trains")
    take_all(group)
    assert group.results == [RESULT, RESULT]


@pytest.mark.parametrize("fates", [("dies", "loses its peer"), ("loses its peer", "dies")])
def test_error_of_a_rank_whose_peer_died_is_the_death_of_the_peer(
    fates: tuple[str, str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(group_module, "PEER_WAIT_S", WAIT_S)
    group = begin(*fates)
    with pytest.raises(PartDiedError, match=f"trainer rank {fates.index('dies')} died"):
        take_all(group)


def test_error_of_a_rank_whose_peers_live_is_its_own():
    group = begin("loses its peer", "trains")
    with pytest.raises(ray.exceptions.RayTaskError, match="connection closed by peer"):
        take_all(group)


def test_actor_that_ray_restarted_says_that_it_waits_to_be_begun_again():
    part = start_part(StandInRank, "trains", max_restarts=-1)
    wait_started([part])
    process = result_of(part.actor.process.remote(), "it")
    os.kill(process, signal.SIGKILL)

    def is_back() -> Any:
        try:
            return result_of(part.actor.process.remote(), "it") != process
        except PartDiedError:
            return False

    wait_until(is_back, "the restarted process")
    with pytest.raises(NotBegunError, match="StandInRank has been restarted and is not set up yet"):
        result_of(part.actor.train.remote(""), "it")
    result_of(part.actor.begin.remote("trains"), "it")
    assert result_of(part.actor.train.remote(""), "it") == RESULT
