from __future__ import annotations

from typing import Any

import pytest

from services.contracts import TargetState
from services.errors import TargetError
from services.target.replica import MOST_QUARANTINES, QUARANTINES_S, Replica, choose_to_end


def replica(index: int = 0, asked_s: float = 0.0, **known: Any) -> Replica:
    return Replica(index, actor=None, asked_s=asked_s, **known)


HERE = "127.0.0.1:5000"


@pytest.mark.parametrize(
    ("known", "state"),
    [
        ({}, "pending"),
        ({"is_placed": True}, "loading"),
        ({"is_placed": True, "address": HERE, "last_address": HERE}, "serving"),
        ({"is_placed": True, "last_address": HERE}, "silent"),
        ({"last_address": HERE}, "silent"),
        ({"is_placed": True, "failure": TargetError("no weights")}, "failed"),
        ({"last_address": HERE, "failure": TargetError("the device failed")}, "silent"),
        ({"is_placed": True, "last_address": HERE, "quarantine": "it gave NaN"}, "quarantined"),
        ({"is_dead": True, "last_address": HERE, "quarantine": "it gave NaN"}, "failed"),
        ({"is_dead": True, "last_address": HERE}, "failed"),
        ({"address": HERE, "last_address": HERE, "drained_from_s": 3.0}, "draining"),
    ],
)
def test_state_follows_from_what_is_known(known: dict[str, Any], state: str) -> None:
    assert replica(**known).state == state


def test_record_says_why_a_target_does_not_serve() -> None:
    assert replica(2, missing="1 fpga, the cluster has 0 in all").record() == TargetState(
        index=2, state="pending", message="waits for 1 fpga, the cluster has 0 in all"
    )
    assert replica(is_placed=True, failure=TargetError("no weights")).record().message == "no weights"
    silent = replica(last_address=HERE, lost="lost its process; Ray restarts it").record()
    assert (silent.address, silent.message) == (HERE, "lost its process; Ray restarts it")
    assert replica(address=HERE, last_address=HERE, lost="old").record().message == ""


def test_choose_to_end_takes_those_that_give_nothing_first_and_the_newest_of_a_kind() -> None:
    serving = {"is_placed": True, "address": HERE, "last_address": HERE}
    replicas = [
        replica(0, **serving),
        replica(1, **serving),
        replica(2, is_placed=True),
        replica(3),
        replica(4),
        replica(5, is_dead=True),
        replica(6, is_placed=True, last_address=HERE),
        replica(7, **serving, drained_from_s=1.0),
    ]
    assert [chosen.index for chosen in choose_to_end(replicas, 99)] == [5, 4, 3, 2, 6, 1, 0]
    assert [chosen.index for chosen in choose_to_end(replicas, 2)] == [5, 4]
    assert choose_to_end(replicas, 0) == []


def test_banned_target_is_restarted_a_few_times_and_says_why() -> None:
    wrong = replica(4, is_placed=True, last_address=HERE)
    for restart in range(MOST_QUARANTINES):
        wrong.address = HERE
        assert wrong.ban("it gave NaN 3 times", float(restart))
        assert (wrong.address, wrong.banned_address) == (None, HERE)
    assert wrong.record() == TargetState(index=4, state="quarantined", address=HERE, message="it gave NaN 3 times")
    assert wrong.ban("it gave NaN 3 times", QUARANTINES_S + 0.5), "the first restart counts no more"
    assert not wrong.ban("it gave NaN 3 times", QUARANTINES_S + 0.6)


@pytest.mark.parametrize(
    ("known", "starts"),
    [
        ({}, True),
        ({"asked_s": -1.0}, False),
        ({"asked_s": -1.0, "is_placed": True}, True),
        ({"is_placed": True, "last_address": HERE}, True),
        ({"is_placed": True, "address": HERE, "last_address": HERE}, False),
        ({"is_dead": True}, False),
        ({"drained_from_s": 1.0}, False),
    ],
)
def test_target_that_loads_or_was_just_asked_for_may_serve_any_moment(known: dict[str, Any], starts: bool) -> None:
    assert replica(**{"asked_s": 0.0, **known}).starts(-0.5) is starts
