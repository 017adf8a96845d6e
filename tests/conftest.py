"""What every test shares: one thread a process, no network, no foreign Ray, markers by folder, one Ray a session."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

FOLDER = Path(__file__).parent
MARKERS = ("unit", "contract", "integration", "e2e")

E2E_TIMEOUT_S = 1800
"""Many times what a test of tests/e2e takes on an idle machine: it ends what hangs, and nothing else."""

# Before anything imports torch, transformers or ray: they read these once, and the processes that tests start inherit
# them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    RAY_USAGE_STATS_ENABLED="0",
    TOKENIZERS_PARALLELISM="false",
)
os.environ.pop("RAY_ADDRESS", None)

# A shell that starts this process in the background has it ignore Ctrl-C, and every command that a test starts, too.
signal.signal(signal.SIGINT, signal.default_int_handler)

# A slow machine is no counterexample.
settings.register_profile("slipstream", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("slipstream")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark each test by the folder it lies in, so that `-m unit` works, and let those that share a Ray come last.

    A process can hold one Ray at a time: tests that start their own come first and find none.
    """
    for item in items:
        folder = item.path.relative_to(FOLDER).parts[0]
        if folder in MARKERS:
            item.add_marker(folder)
        if folder == "e2e":
            item.add_marker(pytest.mark.timeout(E2E_TIMEOUT_S))
    items.sort(key=lambda item: "ray_cluster" in getattr(item, "fixturenames", ()))


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A local Ray that all tests of the session share; tests that kill things start their own."""
    import ray

    from trainer.cluster import start_local_ray

    start_local_ray(
        num_cpus=4,
        num_gpus=0,
        object_store_memory=80 * 1024**2,  # the smallest that Ray takes: containers often have 64 MB of /dev/shm
    )
    yield
    ray.shutdown()
