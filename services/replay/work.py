"""The work queue in Redis (`CaptureQueue` says what it does). A capture is in it once, waiting or taken."""

from __future__ import annotations

import redis
from typing_extensions import override

from services.contracts import CaptureJob
from services.replay.protocol import CaptureQueue
from services.replay.scripts import Scripts


class WorkQueue(CaptureQueue):
    """Jobs from the coordinator to the shard."""

    def __init__(self, client: redis.Redis, prefix: str) -> None:
        """Attach to the queue under `prefix`."""
        self._client = client
        self._prefix = prefix
        self._scripts = Scripts(client, prefix)

    @override
    def push(self, job: CaptureJob) -> bool:
        status, _ = self._scripts.run("work_push", job.capture, _entry(job))
        return status == "OK"

    @override
    def take(self, now_s: float, lease_s: float) -> CaptureJob | None:
        status, rest = self._scripts.run("work_take", now_s + lease_s)
        return _job(rest[0]) if status == "OK" else None

    @override
    def renew(self, job: CaptureJob, now_s: float, lease_s: float) -> bool:
        status, _ = self._scripts.run("work_renew", job.capture, job.attempt, now_s + lease_s)
        return status == "OK"

    @override
    def done(self, job: CaptureJob) -> bool:
        status, _ = self._scripts.run("work_done", job.capture, job.attempt)
        return status == "OK"

    @override
    def give_back(self, job: CaptureJob) -> bool:
        status, _ = self._scripts.run("work_give_back", job.capture, job.attempt)
        return status == "OK"

    @override
    def expire(self, now_s: float) -> list[int]:
        _, rest = self._scripts.run("work_expire", now_s)
        return [int(capture) for capture in rest]

    @override
    def size(self) -> int:
        return int(self._client.llen(f"{self._prefix}:work:queue"))


def _entry(job: CaptureJob) -> str:
    # The scripts count attempts in front of the json: Lua's json library would turn empty lists into objects.
    return f"{job.attempt} {job.model_dump_json()}"


def _job(entry: bytes) -> CaptureJob:
    attempt, _, text = entry.partition(b" ")
    return CaptureJob.model_validate_json(text).model_copy(update={"attempt": int(attempt)})
