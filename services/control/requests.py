"""Requests by their ids: each is handed on once, however often it comes, and its reply is kept for a while. Pure."""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

MOST_REPLIES = 1000
"""Replies that are remembered; a request that comes again after so many others is a new one."""

MOST_WAITING = 100
"""Requests that may wait for the driver."""


class Submitted(NamedTuple):
    """What became of a request that came in: exactly one is set, or none and it waits."""

    reply: bytes | None = None
    refusal: str = ""


class RequestBook:
    """What was asked and what was answered, in bounded memory."""

    def __init__(self, *, most_replies: int = MOST_REPLIES, most_waiting: int = MOST_WAITING) -> None:
        self._most_replies = most_replies
        self._most_waiting = most_waiting
        self._waiting: OrderedDict[str, bytes] = OrderedDict()
        self._taken: dict[str, bytes] = {}
        self._answered: OrderedDict[str, tuple[bytes, bytes]] = OrderedDict()

    def submit(self, request_id: str, request: bytes) -> Submitted:
        """Take in a request; one that is known is not handed on again."""
        known, reply = self._answered.get(request_id, (None, None))
        known = known or self._waiting.get(request_id) or self._taken.get(request_id)
        if known is not None and known != request:
            return Submitted(refusal=f"request id {request_id!r} was used for another request; choose a new one")
        if reply is not None:
            return Submitted(reply=reply)
        if known is None:
            if len(self._waiting) >= self._most_waiting:
                return Submitted(refusal=f"{len(self._waiting)} requests wait for the driver already; try again later")
            self._waiting[request_id] = request
        return Submitted()

    def take(self) -> list[bytes]:
        """The requests that are to be carried out, oldest first; each once."""
        taken = list(self._waiting.values())
        self._taken.update(self._waiting)
        self._waiting.clear()
        return taken

    def answer(self, request_id: str, reply: bytes) -> None:
        """Keep the reply to a request that was taken; the oldest replies are forgotten."""
        request = self._taken.pop(request_id, None)
        if request is None:
            return
        self._answered[request_id] = (request, reply)
        while len(self._answered) > self._most_replies:
            self._answered.popitem(last=False)
