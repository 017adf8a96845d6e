"""The Ray cluster that a run uses: the one that is there, or a local one that ends with the run."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
import ray.exceptions

from services.errors import DeadlineError, PlacementError, SlipstreamError

PLACEMENT_DEADLINE_S = 60.0
"""An actor that is not placed by then is reported with the resource it waits for."""

START_DEADLINE_S = 600.0
"""How long a placed actor may take to come up."""

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


@dataclass(frozen=True)
class Part:
    """An actor of a run and what it asks of the cluster."""

    name: str
    actor: Any
    resources: Mapping[str, float]


def start_part(cls: type, *args: Any, num_cpus: float = 0, num_gpus: float = 0, **options: Any) -> Part:
    """Start an actor; refuse at once what the whole cluster could never place.

    Args:
        cls: The actor's class, named in errors.
        *args: Of its constructor.
        num_cpus: CPUs to reserve.
        num_gpus: GPUs to reserve.
        **options: Further options of a Ray actor.

    Raises:
        PlacementError: The cluster has fewer CPUs or GPUs in all than the actor asks for.
    """
    resources = {"CPU": num_cpus, "GPU": num_gpus}
    total = ray.cluster_resources()
    for resource, wanted in resources.items():
        if wanted > total.get(resource, 0):
            raise PlacementError(
                f"{cls.__name__} asks for {wanted:g} {resource}, the cluster has {total.get(resource, 0):g} in all; "
                f"lower num_{resource.lower()}s in the recipe or add a node"
            )
    actor: Any = ray.remote(cls).options(num_cpus=num_cpus, num_gpus=num_gpus, **options).remote(*args)
    return Part(cls.__name__, actor, resources)


def wait_started(parts: Sequence[Part]) -> None:
    """Wait until every actor is placed and constructed; raises what a constructor raised.

    Raises:
        PlacementError: One is not placed after a minute because a resource is taken; names it.
        DeadlineError: One is placed but does not come up.
    """
    waiting = {part.actor.__ray_ready__.remote(): part for part in parts}
    deadline_s = time.monotonic() + START_DEADLINE_S
    while waiting:
        done, _ = ray.wait(list(waiting), timeout=PLACEMENT_DEADLINE_S)
        for future in done:
            del waiting[future]
            result_of(future)
        if done:
            continue
        free = ray.available_resources()
        for part in waiting.values():
            for resource, wanted in part.resources.items():
                if wanted > free.get(resource, 0):
                    raise PlacementError(
                        f"{part.name} was not placed within {PLACEMENT_DEADLINE_S:g} s: it asks for {wanted:g} "
                        f"{resource}, and {free.get(resource, 0):g} are free in the cluster. Lower what the recipe "
                        "asks for, end other jobs, or add a node"
                    )
        if time.monotonic() > deadline_s:
            names = ", ".join(part.name for part in waiting.values())
            raise DeadlineError(f"{names} did not start within {START_DEADLINE_S:g} s; see Ray's logs")


def result_of(future: Any, *, timeout_s: float | None = None) -> Any:
    """What a call to a part returned; an error that the user can act on comes without Ray's wrapping.

    Raises:
        SlipstreamError: What the part raised, or that it died.
        DeadlineError: There is no answer in time.
    """
    try:
        return ray.get(future, timeout=timeout_s)
    except ray.exceptions.GetTimeoutError as error:
        raise DeadlineError(f"a part of the run did not answer within {timeout_s:g} s") from error
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, SlipstreamError):
            raise error.cause from None
        raise
    except ray.exceptions.ActorDiedError as error:
        raise SlipstreamError(f"a part of the run died: {error}") from error
