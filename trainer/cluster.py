"""The Ray cluster that a run uses: the one that is there, or a local one that ends with the run."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ray
import ray.exceptions

from services.control.attach import NoClusterError, attach_ray
from services.errors import DeadlineError, NotBegunError, PartDiedError, PlacementError, SlipstreamError
from services.logs import LogPlace, logged
from services.placement import Ask, alive_nodes
from trainer.reaper import Reaper
from trainer.supervision import PASSING, PASSING_DEADLINE_S, RETRY_S

logger = logging.getLogger(__name__)

PLACEMENT_DEADLINE_S = 60.0
"""An actor that is not placed by then is reported with the resource it waits for."""

START_DEADLINE_S = 600.0
"""How long a placed actor may take to come up."""

ANSWER_DEADLINE_S = 120.0
"""How long a part may take to answer a question that needs no long work."""

LOOK_S = 0.5
"""How often a wait for actors looks at its deadlines, and at what was asked of the run."""

NOTHING = Ask()
"""An actor that any node may hold."""

LOCAL_OBJECT_STORE_BYTES = 80 * 1024**2
"""Ray's smallest object store, nearly: tensors never pass through it."""

START_FAILED = "timed out during startup"
MOST_STARTS = 3


@contextlib.contextmanager
def ray_cluster(*, local: bool) -> Iterator[None]:
    """Attach to the running Ray cluster, or start a local one and end it afterwards.

    Args:
        local: Start a local one even if there is a cluster.

    Raises:
        ClusterError: There is a cluster, and it does not let this process in.
    """
    logging.getLogger("ray").setLevel(logging.ERROR)  # notes about its own start are not the user's concern
    on_sigterm = signal.getsignal(signal.SIGTERM)
    with contextlib.redirect_stdout(_PrintedByRay()), contextlib.ExitStack() as ends_last:
        try:
            if local or not _attach():
                _start(ends_last.enter_context(Reaper()))
            signal.signal(signal.SIGTERM, on_sigterm)  # Ray's own handler ends the process on the spot
            yield
        finally:
            ray.shutdown()


def _start(reaper: Reaper) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    with reaper.marking():
        start_local_ray(object_store_memory=LOCAL_OBJECT_STORE_BYTES, logging_level=logging.ERROR)


def start_local_ray(**options: Any) -> None:
    """Start a Ray on this machine alone; end it with `ray.shutdown`.

    Seldom, a daemon of it dies in its start, or has no core to start on for half a minute; Ray gives up then, and is
    started anew.

    Args:
        options: For `ray.init`.
    """
    for start in range(1, MOST_STARTS + 1):
        try:
            ray.init(address="local", include_dashboard=False, log_to_driver=False, **options)
        except Exception as error:  # Ray raises nothing more special
            if START_FAILED not in str(error) or start == MOST_STARTS:
                raise
            logger.warning("Ray did not start in time; it is started again")
            ray.shutdown()
        else:
            return


class _PrintedByRay(io.TextIOBase):
    """Takes what Ray prints to standard output when a worker dies: that belongs to the run's log, not to its result."""

    def write(self, text: str) -> int:
        if text.strip():
            logger.info("%s", text.rstrip())
        return len(text)


def _attach() -> bool:
    try:
        attach_ray()
    except NoClusterError:
        return False
    return True


@dataclass(frozen=True)
class Part:
    """An actor of a run.

    Attributes:
        name: For errors.
        actor: Its handle; call nothing before it has started.
        ask: What it asks of the cluster.
        begin: Has it constructed if it is not; done then, or raises what the constructor raised.
        placed: Done once its process runs.
        started: What the first `begin` gave.
    """

    name: str
    actor: Any
    ask: Ask
    begin: Callable[[], Any]
    placed: Any
    started: Any


def start_part(cls: type, *args: Any, ask: Ask = NOTHING, log: LogPlace | None = None, **options: Any) -> Part:
    """Start an actor; refuse at once what the whole cluster could never place.

    Args:
        cls: The actor's class, named in errors.
        *args: Of its constructor.
        ask: What it needs of the node that holds it.
        log: Where its process logs to, if anywhere.
        **options: Further options of a Ray actor.

    Raises:
        PlacementError: No node of the cluster could hold the actor, even if nothing else ran.
    """
    check_fits(cls.__name__, ask)
    actor: Any = ray.remote(_deferred(logged(cls, log) if log else cls)).options(**ask.options(), **options).remote()

    def begin() -> Any:
        return actor.begin.remote(*args)

    return Part(cls.__name__, actor, ask, begin, placed=actor.__ray_ready__.remote(), started=begin())


def check_fits(name: str, ask: Ask) -> None:
    """Check that some node of the cluster, were it idle, could hold an actor.

    Raises:
        PlacementError: None could; names the resource or label.
    """
    if why := ask.why_never(alive_nodes()):
        raise PlacementError(
            f"{name} asks for {why}; ask for less in its section of the recipe (num_gpus, num_cpus, resources, "
            "labels), or add a node"
        )


def wait_started(parts: Sequence[Part], look: Callable[[], None] = lambda: None) -> None:
    """Wait until every actor is placed and constructed; raises what a constructor raised.

    One that meets something which is just being brought back begins again.

    Args:
        parts: The actors.
        look: Called about twice a second while waiting; what it raises ends the wait.

    Raises:
        PartDiedError: One lost its process; the others are there.
        PlacementError: One is not placed after a minute because a resource is taken; names it.
        DeadlineError: One does not come up.
    """
    waiting = {future: part for part in parts for future in (part.placed, part.started)}
    began_s = time.monotonic()
    death: PartDiedError | None = None
    while waiting:
        done, _ = ray.wait(list(waiting), timeout=LOOK_S)
        again: list[Part] = []
        for future in done:
            part = waiting.pop(future)
            try:
                result_of(future, part.name)
            except PartDiedError as error:
                death = error
            except PASSING:
                if time.monotonic() > began_s + PASSING_DEADLINE_S:
                    raise
                again.append(part)
        look()
        if again:
            time.sleep(RETRY_S)
            waiting |= {part.begin(): part for part in again}
        waited_s = time.monotonic() - began_s
        if waited_s > PLACEMENT_DEADLINE_S:
            _check_placed([part for future, part in waiting.items() if future is part.placed])
        if waiting and waited_s > START_DEADLINE_S:
            names = ", ".join(sorted({part.name for part in waiting.values()}))
            raise DeadlineError(f"{names} did not start within {START_DEADLINE_S:g} s; see Ray's logs")
    if death is not None:
        raise death


def result_of(future: Any, what: str, *, timeout_s: float | None = None) -> Any:
    """What a call to a part returned; an error that the user can act on comes without Ray's wrapping.

    Args:
        future: The call.
        what: Names the part in errors.
        timeout_s: Longest wait; None waits for ever.

    Raises:
        PartDiedError: Its process died.
        SlipstreamError: What the part raised.
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
        raise PartDiedError(
            f"{what} died; the same command again goes on from the last checkpoint. Ray says: {error}"
        ) from error


def _deferred(cls: type) -> type:
    """The class, constructed by `begin`: what a constructor raises inside Ray comes back as a text only.

    An actor that Ray restarts waits for `begin` again, and says so to whoever asks it anything before. A `begin` that
    was under way when the process died may reach the new one beside the driver's next: the first of them counts.
    """

    def missing(self: Any, name: str) -> Any:
        raise NotBegunError(f"{cls.__name__} has been restarted and is not set up yet: it has no {name!r}")

    def wait(self: Any) -> None:
        """Nothing yet: the actor's process runs, and that is all that being placed means."""
        self._beginning = threading.Lock()
        self._has_begun = False

    def begin(self: Any, *args: Any) -> None:
        with self._beginning:
            if not self._has_begun:
                cls.__init__(self, *args)  # type: ignore[misc]  # that very one
                self._has_begun = True

    return type(cls.__name__, (cls,), {"__init__": wait, "begin": begin, "__getattr__": missing})


def _check_placed(unplaced: Sequence[Part]) -> None:
    if not unplaced:
        return
    nodes, free = alive_nodes(), ray.available_resources()
    for part in unplaced:
        if why := part.ask.why_not_now(nodes, free):
            raise PlacementError(
                f"{part.name} was not placed within {PLACEMENT_DEADLINE_S:g} s: it asks for {why}. Lower what the "
                "recipe asks for, end other jobs, or add a node"
            )
