"""What every work queue does: the one in Redis and the one in memory."""

from __future__ import annotations

from replaying import make_job

from services.replay.protocol import CaptureQueue


def test_jobs_come_in_order_and_whole(work: CaptureQueue) -> None:
    jobs = [make_job(capture).model_copy(update={"last_rows": ()}) for capture in (2, 0, 1)]
    assert [work.push(job) for job in jobs] == [True] * 3
    assert work.push(jobs[0]) is False
    assert work.size() == 3
    assert [work.take(0.0, 10.0) for _ in range(4)] == [*jobs, None]
    assert work.push(jobs[1]) is False
    assert work.size() == 0
    assert work.done(make_job(0, attempt=1)) is False
    assert work.done(jobs[1]) is True
    assert work.done(jobs[1]) is False
    assert work.push(jobs[1]) is True
    assert work.take(0.0, 10.0) == jobs[1]


def test_newer_attempt_replaces_a_waiting_one_in_place(work: CaptureQueue) -> None:
    for capture in (0, 1):
        work.push(make_job(capture))
    assert work.push(make_job(0, attempt=3)) is True
    assert work.take(0.0, 1.0) == make_job(0, attempt=3)
    assert work.take(0.0, 1.0) == make_job(1)


def test_ended_job_that_waits_twice_is_taken_once(work: CaptureQueue) -> None:
    work.push(make_job(0))
    work.done(make_job(0))
    work.push(make_job(0))
    assert work.take(0.0, 1.0) == make_job(0)
    assert work.take(0.0, 1.0) is None


def test_overdue_jobs_return_in_plan_order_with_their_next_attempt(work: CaptureQueue) -> None:
    for capture in range(12):
        work.push(make_job(capture))
    for _ in range(11):
        work.take(100.0, 10.0)
    assert work.renew(make_job(3, attempt=4), 105.0, 10.0) is True
    assert work.expire(110.0) == []
    assert sorted(work.expire(110.1)) == [0, 1, 2, *range(4, 11)]
    assert work.expire(115.1) == [3]
    taken = [work.take(0.0, 1.0) for _ in range(12)]
    assert [(job.capture, job.attempt) for job in taken if job] == [
        (3, 5),
        *((capture, 1) for capture in (0, 1, 2, *range(4, 11))),
        (11, 0),
    ]


def test_given_back_job_is_the_next_one_taken(work: CaptureQueue) -> None:
    for capture in (0, 1):
        work.push(make_job(capture))
    work.take(0.0, 1.0)
    assert work.give_back(make_job(0)) is True
    assert work.give_back(make_job(0)) is False
    assert work.renew(make_job(0), 0.0, 1.0) is False
    assert work.take(0.0, 1.0) == make_job(0, attempt=1)
    assert work.give_back(make_job(0)) is False  # the older attempt is not what is taken
