"""Follows one output directory's history and hands it to any number of pages."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
import socket
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from services.dashboard.history import Axis, History
from services.dashboard.status import run_status
from services.dashboard.tail import JsonLinesTail

logger = logging.getLogger(__name__)

POLL_S = 0.25
"""How often the file is looked at. A step shows within a second: this, the driver's poll of 0.25 s, and drawing it."""

HEARTBEAT_S = 5.0
"""A page hears at least so often how the run stands; that is also how a page notices that its dashboard is gone."""

SILENT_AFTER_S = 60.0
"""A driver records figures about once a second; only while it loads a large target it says nothing for longer."""

LONGEST_LOAD_S = 900.0
"""That is what to allow where a process with the driver's number lives."""

T = TypeVar("T")


class Feed:
    """The run in an output directory, up to date while `follow` runs.

    History is touched in one thread alone; everything else is for the event loop.

    Args:
        output_dir: The run's.
        follows_driver: The driver started this dashboard and ends it, so a dashboard that runs has a driver.
        clock: Wall clock.
    """

    def __init__(
        self, output_dir: Path, *, follows_driver: bool = False, clock: Callable[[], float] = time.time
    ) -> None:
        self.num_streams = 0
        self._output_dir = output_dir
        self._follows_driver = follows_driver
        self._clock = clock
        self._tail = JsonLinesTail(output_dir / "telemetry.jsonl")
        self._num_broken = 0
        self._history = History()
        self._thread = ThreadPoolExecutor(1, "history")
        self._changed = asyncio.Event()
        self._closing = asyncio.Event()

    async def follow(self) -> None:
        """Read the file until the feed is closed."""
        while not self._closing.is_set():
            await self.look()
            await _wait(self._closing, POLL_S)

    async def look(self) -> None:
        """Read what is new, and wake whoever waits for it."""
        if await self._run(self._look):
            changed, self._changed = self._changed, asyncio.Event()
            changed.set()

    async def close(self) -> None:
        """Read once more, and let every stream end with that."""
        await self.look()
        self._closing.set()
        self._changed.set()

    async def status(self) -> dict[str, Any]:
        """How the run stands."""
        return await self._run(self._status)

    async def history(self, axis: Axis, low: float = -math.inf, high: float = math.inf) -> bytes:
        """The whole picture as JSON: `id` to go on from, `status`, `series`, `events`, `evaluations`."""
        return await self._run(partial(self._picture, axis, low, high))

    async def updates(self, last_id: str | None) -> AsyncGenerator[tuple[str, str, dict[str, Any]]]:
        """What comes after an id: events of a stream, each with its name, its id and its data.

        `update` has what is new, and at least every few seconds how the run stands; `reset` says that a reader must
        take the whole picture again, and is the last one.

        Args:
            last_id: As the picture or an earlier update gave it; None begins now. Ids stay good when the dashboard is
                started again.
        """
        self.num_streams += 1
        try:
            offset = await self._run(partial(self._offset, last_id))
            while offset is not None:
                changed, is_last = self._changed, self._closing.is_set()
                found = await self._run(partial(self._update, offset))
                if found is None:
                    break
                offset, update = found
                yield "update", self._id(offset), update
                if is_last:
                    return
                await _wait(changed, HEARTBEAT_S)
            yield "reset", "", {}
        finally:
            self.num_streams -= 1

    async def _run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def _look(self) -> bool:
        has_changed = False
        while True:
            lines = self._tail.look()
            if lines.is_new_file:
                self._history = History()
            for offset, record in lines.records:
                self._history.take(offset, record)
            has_changed |= bool(lines.records) or lines.is_new_file
            self._warn_of_broken_lines()
            if lines.is_all:
                return has_changed

    def _warn_of_broken_lines(self) -> None:
        num_broken = self._tail.num_broken + self._history.num_unreadable
        if num_broken > self._num_broken:
            logger.warning("%s: %d lines are no records of a run; they are left out", self._tail.path, num_broken)
        self._num_broken = num_broken

    def _status(self) -> dict[str, Any]:
        status = run_status(
            self._history, self._clock(), name=self._output_dir.name, silent_after_s=self._silent_after_s()
        )
        return status | {"output_dir": str(self._output_dir)}

    def _silent_after_s(self) -> float:
        """How old the newest record of a living run can be."""
        run = self._history.run or {}
        if self._follows_driver:
            return math.inf
        pid = run.get("pid")
        if pid is None or run.get("host") != socket.gethostname():
            return SILENT_AFTER_S
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return 0.0
        except PermissionError:
            pass  # it is there, and another user's
        return LONGEST_LOAD_S

    def _picture(self, axis: Axis, low: float, high: float) -> bytes:
        picture = {
            "id": self._id(self._history.offset),
            "status": self._status(),
            "series": self._history.series(axis, low, high),
            "events": self._history.events,
            "evaluations": self._history.evaluations,
        }
        return json.dumps(picture, separators=(",", ":"), allow_nan=False).encode()

    def _update(self, offset: int) -> tuple[int, dict[str, Any]] | None:
        news = self._history.since(offset)
        return None if news is None else (self._history.offset, news | {"status": self._status()})

    def _id(self, offset: int) -> str:
        return f"{self._tail.file_id:x}-{offset}"

    def _offset(self, last_id: str | None) -> int | None:
        """The place in the file that an id names; None if it is of another file."""
        if last_id is None:
            return self._history.offset
        file_id, _, offset = last_id.partition("-")
        return int(offset) if file_id == f"{self._tail.file_id:x}" and offset.isdecimal() else None


async def _wait(event: asyncio.Event, timeout_s: float) -> None:
    try:
        await asyncio.wait_for(event.wait(), timeout_s)
    except TimeoutError:
        return
