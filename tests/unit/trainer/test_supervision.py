from __future__ import annotations

import pytest

from services.errors import NotBegunError, PartDiedError, ReplayError, SlipstreamError
from trainer import supervision
from trainer.supervision import MOST_RESTARTS, RESTART_WINDOW_S, Restarts, persist


def test_part_that_dies_too_often_is_given_up_with_the_last_cause():
    restarts = Restarts("the shard")
    for time_s in range(MOST_RESTARTS):
        restarts.count(float(time_s), PartDiedError("again"))
    with pytest.raises(PartDiedError, match=r"the shard died more than 10 times within 600 s.*the last time: enough"):
        restarts.count(MOST_RESTARTS + 1.0, PartDiedError("enough"))


def test_restarts_long_ago_do_not_count():
    restarts = Restarts("the shard")
    for number in range(3 * MOST_RESTARTS):
        restarts.count(number * RESTART_WINDOW_S / MOST_RESTARTS, PartDiedError("again"))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(supervision.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(supervision.time, "sleep", lambda s: now.__setitem__(0, now[0] + s))


@pytest.mark.usefixtures("clock")
def test_asking_goes_on_while_a_part_is_brought_back_and_the_run_is_looked_after():
    answers: list[SlipstreamError | str] = [PartDiedError("gone"), NotBegunError("not yet"), "here"]
    looks: list[int] = []

    def ask() -> str:
        answer = answers.pop(0)
        if isinstance(answer, SlipstreamError):
            raise answer
        return answer

    assert persist(ask, lambda: looks.append(1)) == "here"
    assert len(looks) == 2


@pytest.mark.usefixtures("clock")
def test_what_does_not_pass_is_raised_at_once_and_what_lasts_after_the_deadline():
    def refuse() -> None:
        raise ReplayError("no")

    def never() -> None:
        raise PartDiedError("still gone")

    with pytest.raises(ReplayError, match="no"):
        persist(refuse, lambda: pytest.fail("there is nothing to wait for"))
    with pytest.raises(PartDiedError, match="still gone"):
        persist(never, lambda: None)
