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

ANSWER_DEADLINE_S = 120.0
"""How long a part may take to answer a question that needs no long work."""

LOOK_S = 5.0
"""How often a wait for actors looks at its deadlines."""

LOCAL_OBJECT_STORE_BYTES = 80 * 1024**2
"""Ray's smallest object store, nearly: tensors never pass through it."""


@contextmanager
def ray_cluster(*, local: bool) -> Iterator[None]:
    """Attach to the running Ray cluster, or start a local one and end it afterwards.

    Args:
        local: Start a local one even if there is a cluster.
    """
    logging.getLogger("ray").setLevel(logging.ERROR)  # notes about its own start are not the user's concern
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if local or not _attach(options):
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            ray.init(
                address="local",
                include_dashboard=False,
                object_store_memory=LOCAL_OBJECT_STORE_BYTES,
                **options,
            )
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
    """An actor of a run.

    Attributes:
        name: For errors.
        actor: Its handle; call nothing before it has started.
        resources: What it asks of the cluster.
        placed: Done once its process runs.
        started: Done once it is constructed, or raises what its constructor raised.
    """

    name: str
    actor: Any
    resources: Mapping[str, float]
    placed: Any
    started: Any


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
    check_fits(cls.__name__, resources)
    actor: Any = ray.remote(_deferred(cls)).options(num_cpus=num_cpus, num_gpus=num_gpus, **options).remote()
    return Part(cls.__name__, actor, resources, placed=actor.__ray_ready__.remote(), started=actor.begin.remote(*args))


def check_fits(name: str, resources: Mapping[str, float]) -> None:
    """Check that the cluster, were it empty, could place an actor.

    Raises:
        PlacementError: It has less in all than the actor asks for.
    """
    total = ray.cluster_resources()
    for resource, wanted in resources.items():
        if wanted > total.get(resource, 0):
            raise PlacementError(
                f"{name} asks for {wanted:g} {resource}, the cluster has {total.get(resource, 0):g} in all; "
                f"lower num_{resource.lower()}s in the recipe or add a node"
            )


def wait_started(parts: Sequence[Part]) -> None:
    """Wait until every actor is placed and constructed; raises what a constructor raised.

    Raises:
        PlacementError: One is not placed after a minute because a resource is taken; names it.
        DeadlineError: One does not come up.
    """
    waiting = {future: part for part in parts for future in (part.placed, part.started)}
    began_s = time.monotonic()
    while waiting:
        done, _ = ray.wait(list(waiting), timeout=LOOK_S)
        for future in done:
            result_of(future, waiting.pop(future).name)
        waited_s = time.monotonic() - began_s
        if waited_s > PLACEMENT_DEADLINE_S:
            _check_placed([part for future, part in waiting.items() if future is part.placed])
        if waiting and waited_s > START_DEADLINE_S:
            names = ", ".join(sorted({part.name for part in waiting.values()}))
            raise DeadlineError(f"{names} did not start within {START_DEADLINE_S:g} s; see Ray's logs")


def result_of(future: Any, what: str, *, timeout_s: float | None = None) -> Any:
    """What a call to a part returned; an error that the user can act on comes without Ray's wrapping.

    Args:
        future: The call.
        what: Names the part in errors.
        timeout_s: Longest wait; None waits for ever.

    Raises:
        SlipstreamError: What the part raised, or that it died.
        DeadlineError: There is no answer in time.
    """
    try:
        return ray.get(future, timeout=timeout_s)
    except ray.exceptions.GetTimeoutError as error:
        raise DeadlineError(f"{what} did not answer within {timeout_s:g} s") from error
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, SlipstreamError):
            raise error.cause from None
        raise
    except ray.exceptions.RayActorError as error:
        raise SlipstreamError(
            f"{what} died; the same command again goes on from the last checkpoint. Ray says: {error}"
        ) from error


def _deferred(cls: type) -> type:
    """The class, constructed by `begin`: what a constructor raises inside Ray comes back as a text only."""

    def wait(self: Any) -> None:
        """Nothing yet: the actor's process runs, and that is all that being placed means."""

    return type(cls.__name__, (cls,), {"__init__": wait, "begin": cls.__init__})  # type: ignore[misc]  # that very one


def _check_placed(unplaced: Sequence[Part]) -> None:
    free = ray.available_resources() if unplaced else {}
    for part in unplaced:
        for resource, wanted in part.resources.items():
            if wanted > free.get(resource, 0):
                raise PlacementError(
                    f"{part.name} was not placed within {PLACEMENT_DEADLINE_S:g} s: it asks for {wanted:g} "
                    f"{resource}, and {free.get(resource, 0):g} are free in the cluster. Lower what the recipe "
                    "asks for, end other jobs, or add a node"
                )
