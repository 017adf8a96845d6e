"""The Ray cluster that a run uses: the one that is there, or a local one that ends with the run."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray
import ray.exceptions

from services.errors import PlacementError

PLACEMENT_DEADLINE_S = 60.0
"""An actor that is not placed by then is reported with the resource it waits for."""

LOCAL_OBJECT_STORE_BYTES = 80 * 1024**2
"""Ray's smallest object store, nearly: tensors never pass through it."""


@contextmanager
def ray_cluster(*, local: bool) -> Iterator[None]:
    """Attach to the running Ray cluster, or start a local one and end it afterwards.

    Args:
        local: Start a local one even if there is a cluster.
    """
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": False}
    if local or not _attach(options):
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(
            address="local",
            include_dashboard=False,
            object_store_memory=LOCAL_OBJECT_STORE_BYTES,
            **options,
        )
    try:
        yield
    finally:
        ray.shutdown()


def _attach(options: dict[str, Any]) -> bool:
    try:
        ray.init(address="auto", **options)
    except ConnectionError:
        return False
    return True


def start_actor(cls: type, *args: Any, num_cpus: float = 0, num_gpus: float = 0, **options: Any) -> Any:
    """Start an actor; refuse at once what the whole cluster could never place.

    Raises:
        PlacementError: The cluster has fewer CPUs or GPUs in all than the actor asks for.
    """
    total = ray.cluster_resources()
    for resource, wanted in (("CPU", num_cpus), ("GPU", num_gpus)):
        if wanted > total.get(resource, 0):
            raise PlacementError(
                f"{cls.__name__} asks for {wanted:g} {resource}, the cluster has {total.get(resource, 0):g} in all; "
                f"lower num_{resource.lower()}s in the recipe or add a node"
            )
    return ray.remote(cls).options(num_cpus=num_cpus, num_gpus=num_gpus, **options).remote(*args)


def wait_placed(actors: Sequence[Any], what: str, deadline_s: float = PLACEMENT_DEADLINE_S) -> None:
    """Wait until every actor has been placed and constructed.

    Raises:
        PlacementError: Some are not placed in time; names what is free and what is wanted.
    """
    ready = [actor.__ray_ready__.remote() for actor in actors]
    done, missing = ray.wait(ready, num_returns=len(ready), timeout=deadline_s)
    ray.get(done)  # raises what the constructor raised
    if missing:
        free = ", ".join(
            f"{name} {amount:g}" for name, amount in sorted(ray.available_resources().items()) if name in ("CPU", "GPU")
        )
        raise PlacementError(
            f"{len(missing)} of {len(actors)} {what} not placed after {deadline_s:g} s; free in the cluster: "
            f"{free or 'nothing'}. Lower what the recipe asks for, or free or add a node"
        )
