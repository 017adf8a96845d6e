"""The work queue: captures that wait for a shard, in plan order. A capture is in it once, waiting or taken."""

from __future__ import annotations

import redis

from services.contracts import CaptureJob
from services.replay.scripts import Scripts


class WorkQueue:
    """Jobs from the coordinator to the shard. A taken job is leased: a shard that dies loses none."""

    def __init__(self, client: redis.Redis, prefix: str) -> None:
        """Attach to the queue under `prefix`."""
        self._client = client
        self._prefix = prefix
        self._scripts = Scripts(client, prefix)

    def push(self, job: CaptureJob) -> bool:
        """Append a job.

        Returns:
            False if the capture is in the queue already, waiting or taken; a newer attempt then replaces the older one
            where it stands.
        """
        status, _ = self._scripts.run("work_push", job.capture, _entry(job))
        return status == "OK"

    def take(self, now_s: float, lease_s: float) -> CaptureJob | None:
        """Take the oldest waiting job, or None; it goes back unless `done` or `renew` comes within `lease_s`.

        `RedisTable.commit` and `RedisTable.abandon` end the job in the same transition.
        """
        status, rest = self._scripts.run("work_take", now_s + lease_s)
        return _job(rest[0]) if status == "OK" else None

    def renew(self, job: CaptureJob, now_s: float, lease_s: float) -> bool:
        """Keep a taken job for another `lease_s`, and note its attempt; False if it is not taken any more."""
        status, _ = self._scripts.run("work_renew", job.capture, job.attempt, now_s + lease_s)
        return status == "OK"

    def done(self, job: CaptureJob) -> bool:
        """End a job without an outcome; False if this attempt of it is not in the queue."""
        status, _ = self._scripts.run("work_done", job.capture, job.attempt)
        return status == "OK"

    def give_back(self, job: CaptureJob) -> bool:
        """Return a taken job to the front of the queue with its next attempt, as `expire` does.

        Returns:
            False if this attempt is not taken: the job ended, waits, or was given out again.
        """
        status, _ = self._scripts.run("work_give_back", job.capture, job.attempt)
        return status == "OK"

    def expire(self, now_s: float) -> list[int]:
        """Return jobs whose shard let their deadline pass to the front, in plan order, each with its next attempt.

        Returns:
            Their captures.
        """
        _, rest = self._scripts.run("work_expire", now_s)
        return [int(capture) for capture in rest]

    def size(self) -> int:
        """Number of jobs that wait."""
        return int(self._client.llen(f"{self._prefix}:work:queue"))


def _entry(job: CaptureJob) -> str:
    # The scripts count attempts in front of the json: Lua's json library would turn empty lists into objects.
    return f"{job.attempt} {job.model_dump_json()}"


def _job(entry: bytes) -> CaptureJob:
    attempt, _, text = entry.partition(b" ")
    return CaptureJob.model_validate_json(text).model_copy(update={"attempt": int(attempt)})
