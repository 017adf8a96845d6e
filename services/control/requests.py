"""Requests by their ids: each is answered once, however often it comes, and its reply is kept for a while. Pure."""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

MOST_REPLIES = 1000
"""Replies that are remembered; a request that comes again after so many others is a new one."""

MOST_WAITING = 100
"""Requests that may wait for the driver."""


class Submitted(NamedTuple):
    """What became of a request that came in: it has a reply, or is refused, or (neither) waits for the driver."""

    reply: bytes | None = None
    refusal: str = ""
    is_wrong_usage: bool = False
    """Refused because the request itself is wrong, and not only untimely."""


class RequestBook:
    """What was asked and what was answered, in bounded memory.

    A request stays open until it is answered. One that the driver took and did not answer, because a message between
    the two was lost, is handed on again when it is asked again; the driver knows the ids of what it has done.
    """

    def __init__(self, *, most_replies: int = MOST_REPLIES, most_waiting: int = MOST_WAITING) -> None:
        self._most_replies = most_replies
        self._most_waiting = most_waiting
        self._open: dict[str, bytes] = {}
        self._answered: OrderedDict[str, tuple[bytes, bytes]] = OrderedDict()

    def submit(self, request_id: str, request: bytes) -> Submitted:
        """Take in a request."""
        known, reply = self._answered.get(request_id, (self._open.get(request_id), None))
        if known not in (None, request):
            used = f"request id {request_id!r} was used for another request; choose a new one"
            return Submitted(refusal=used, is_wrong_usage=True)
        if known is None and len(self._open) >= self._most_waiting:
            return Submitted(refusal=f"{len(self._open)} requests wait for the driver already; try again later")
        if reply is None:
            self._open[request_id] = request
        return Submitted(reply=reply)

    def open(self) -> list[bytes]:
        """The requests that are not answered, oldest first."""
        return list(self._open.values())

    def answer(self, request_id: str, reply: bytes) -> None:
        """Keep the reply to an open request; the oldest replies are forgotten."""
        request = self._open.pop(request_id, None)
        if request is None:
            return
        self._answered[request_id] = (request, reply)
        while len(self._answered) > self._most_replies:
            self._answered.popitem(last=False)
