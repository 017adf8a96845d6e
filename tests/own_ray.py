"""A local Ray in the test's own process."""

from __future__ import annotations

from typing import Any

import ray

START_FAILED = "timed out during startup"
MOST_STARTS = 3


def start_ray(**options: Any) -> None:
    """Start a local Ray; end it with `ray.shutdown`.

    Ray forks its daemons off this process, in which tests run gRPC servers and clients of their own. Seldom, a daemon
    dies in the fork, and Ray gives up; it is then started anew.
    """
    for start in range(1, MOST_STARTS + 1):
        try:
            ray.init(address="local", include_dashboard=False, log_to_driver=False, **options)
        except Exception as error:  # Ray raises nothing more special
            if START_FAILED not in str(error) or start == MOST_STARTS:
                raise
            ray.shutdown()
        else:
            return
