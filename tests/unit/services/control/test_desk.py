"""The desk without Ray: an object in one event loop."""

from __future__ import annotations

import asyncio

import pytest
from test_control_wire import BARE, FULL

from services.control import desk as desk_module
from services.control.desk import Desk
from services.control.records import Action, PauseAction, Reply, Request, ScaleAction, StatusAction
from services.control.wire import pack_reply, pack_request, pack_status_reply, unpack_reply, unpack_request
from services.errors import WireError

DEADLINE_S = 120.0
DONE = Reply(request_id="r1", is_done=True, message="done")


def make_desk() -> Desk:
    return Desk(pack_status_reply("", BARE))


def packed(action: Action, request_id: str = "r1") -> bytes:
    return pack_request(Request(request_id=request_id, action=action))


def test_status_is_answered_without_the_driver() -> None:
    async def play() -> None:
        desk = make_desk()
        assert unpack_reply(await desk.call(packed(StatusAction())) or b"") == BARE
        await desk.post(pack_status_reply("", FULL))
        assert unpack_reply(await desk.call(packed(StatusAction())) or b"") == FULL
        assert await desk.take(0.0) == []

    asyncio.run(play())


def test_callers_of_one_request_wait_for_one_answer() -> None:
    async def play() -> None:
        desk = make_desk()
        callers = [asyncio.create_task(desk.call(packed(ScaleAction(targets=3)))) for _ in range(3)]
        (request,) = await desk.take(DEADLINE_S)
        assert unpack_request(request).action == ScaleAction(targets=3)
        await desk.answer("r1", pack_reply(DONE))
        answers = await asyncio.wait_for(asyncio.gather(*callers), DEADLINE_S)
        assert [unpack_reply(answer or b"") for answer in answers] == [DONE] * 3
        assert unpack_reply(await desk.call(packed(ScaleAction(targets=3))) or b"") == DONE
        assert await desk.take(0.0) == []

    asyncio.run(play())


def test_request_that_was_lost_on_its_way_to_the_driver_is_handed_on_when_it_comes_again() -> None:
    async def play() -> None:
        desk = make_desk()
        first = asyncio.create_task(desk.call(packed(PauseAction())))
        lost = await desk.take(DEADLINE_S)
        again = asyncio.create_task(desk.call(packed(PauseAction())))
        assert await desk.take(DEADLINE_S) == lost
        await desk.answer("r1", pack_reply(DONE))
        answers = await asyncio.wait_for(asyncio.gather(first, again), DEADLINE_S)
        assert [unpack_reply(answer or b"") for answer in answers] == [DONE] * 2

    asyncio.run(play())


def test_driver_that_waits_gets_a_request_when_it_comes() -> None:
    async def play() -> None:
        desk = make_desk()
        driver = asyncio.create_task(desk.take(DEADLINE_S))
        await asyncio.sleep(0)
        caller = asyncio.create_task(desk.call(packed(PauseAction())))
        assert len(await asyncio.wait_for(driver, DEADLINE_S)) == 1
        await desk.answer("r1", pack_reply(DONE))
        await asyncio.wait_for(caller, DEADLINE_S)

    asyncio.run(play())


def test_id_used_twice_for_different_requests_is_refused() -> None:
    async def play() -> None:
        desk = make_desk()
        first = asyncio.create_task(desk.call(packed(PauseAction())))
        await desk.take(DEADLINE_S)
        refusal = unpack_reply(await desk.call(packed(ScaleAction(targets=2))) or b"")
        assert isinstance(refusal, Reply)
        assert not refusal.is_done
        assert "another request" in refusal.message
        first.cancel()

    asyncio.run(play())


def test_call_that_the_driver_does_not_answer_returns_and_can_come_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async def play() -> None:
        desk = make_desk()
        assert await desk.call(packed(PauseAction())) is None
        assert len(await desk.take(DEADLINE_S)) == 1
        await desk.answer("r1", pack_reply(DONE))
        assert unpack_reply(await desk.call(packed(PauseAction())) or b"") == DONE

    monkeypatch.setattr(desk_module, "ANSWER_WAIT_S", 0.0)
    asyncio.run(play())


def test_what_is_no_request_is_refused() -> None:
    with pytest.raises(WireError):
        asyncio.run(make_desk().call(b"\xff\xff"))
    with pytest.raises(WireError, match="must be given the run's status"):
        Desk(pack_reply(DONE))
