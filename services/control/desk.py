"""Where a run is asked and answers: an async Ray actor between the driver and whoever steers it.

The driver is a busy process without a port; the desk takes requests in its stead and hands out its last word on how
the run is. It ends with the driver.
"""

from __future__ import annotations

import asyncio

from services.control.records import Reply, RunStatus, StatusAction
from services.control.requests import RequestBook, Submitted
from services.control.wire import pack_reply, pack_status_reply, unpack_reply, unpack_request
from services.errors import WireError

ANSWER_WAIT_S = 25.0
"""How long one call waits for the driver; whoever asks again under the same id waits on."""


class Desk:
    """Use it through `ray.remote`; its methods run in one event loop.

    Args:
        status: The run as it begins, a serialized reply to a status request.
    """

    def __init__(self, status: bytes) -> None:
        self._status = _read_status(status)
        self._book = RequestBook()
        self._arrived = asyncio.Event()
        self._answered = asyncio.Condition()

    async def call(self, request: bytes) -> bytes | None:
        """Carry out a serialized request; the reply, or None if the driver has not answered yet: ask again.

        Raises:
            WireError: It is no request, or of another version.
        """
        asked = unpack_request(request)
        if isinstance(asked.action, StatusAction):
            return pack_status_reply(asked.request_id, self._status)
        try:
            async with asyncio.timeout(ANSWER_WAIT_S), self._answered:
                while True:
                    submitted = self._book.submit(asked.request_id, request)
                    if submitted.reply is not None:
                        return submitted.reply
                    if submitted.refusal:
                        return _refuse(asked.request_id, submitted)
                    self._arrived.set()
                    await self._answered.wait()
        except TimeoutError:
            return None

    async def take(self, wait_s: float) -> list[bytes]:
        """The requests to carry out, for the driver; waits up to `wait_s` for one to come, or to come again."""
        try:
            async with asyncio.timeout(wait_s):
                await self._arrived.wait()
        except TimeoutError:
            return []
        self._arrived.clear()
        return self._book.open()

    async def answer(self, request_id: str, reply: bytes) -> None:
        """The driver's reply to a request that it took."""
        self._book.answer(request_id, reply)
        async with self._answered:
            self._answered.notify_all()

    async def post(self, status: bytes) -> None:
        """The driver's newest word on how the run is."""
        self._status = _read_status(status)


def _refuse(request_id: str, submitted: Submitted) -> bytes:
    message, is_wrong_usage = submitted.refusal, submitted.is_wrong_usage
    return pack_reply(Reply(request_id=request_id, is_done=False, message=message, is_wrong_usage=is_wrong_usage))


def _read_status(reply: bytes) -> RunStatus:
    status = unpack_reply(reply)
    if not isinstance(status, RunStatus):
        raise WireError("a desk must be given the run's status")
    return status
