"""The driver's side of the targets: starts the actors, watches them, publishes who answers."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import ActorDiedError, RayActorError, RayTaskError

from services.contracts import Event, TargetDescription, TargetState
from services.errors import DeadlineError, PlacementError, SlipstreamError, TargetError
from services.target.actor import TargetServer
from services.target.config import TargetConfig

PLACEMENT_TIMEOUT_S = 60.0
"""How long Ray may take to place an actor and start its process; nothing heavy is imported until then."""

PING_EVERY_S = 1.0
"""How often every target is asked, and the addresses of those that answer are published."""

STARTING_PING_EVERY_S = 0.2
"""The same until all targets serve for the first time, so that a start is seen at once."""

SILENCE_S = 5.0
"""A target that has not answered for this long is published no more, until it answers again."""

RELOAD_PAUSE_S = 30.0
"""Least time between two restarts of a target that came up and then failed to load or compute."""

ANSWER_TIMEOUT_S = 30.0
"""How long a serving target may take to describe itself."""

STOP_TIMEOUT_S = 10.0
"""How long the watcher may take to notice that it shall end."""

MAX_EVENTS = 1000
"""Events kept for the driver; the oldest are dropped."""


@dataclass
class _Replica:
    """What the watcher knows of one target."""

    index: int
    actor: Any
    pulse: Any = None
    """The outstanding ping."""
    is_placed: bool = False
    is_dead: bool = False
    """Ray gave it up; it will not come back."""
    address: str | None = None
    """Where it serves; None while it does not answer."""
    last_address: str | None = None
    failure: SlipstreamError | None = None
    answered_s: float = 0.0
    restarted_s: float = float("-inf")


class TargetPool:
    """N target actors that restart by themselves, and a thread that publishes the addresses of those that answer.

    Args:
        config: What each target is and how many there are.
        publish: Called about once a second with the live addresses, from the watcher's thread. A SlipstreamError that
            it raises becomes an event; the next call tries again.
    """

    def __init__(self, config: TargetConfig, publish: Callable[[Sequence[str]], None]) -> None:
        self._config = config
        self._publish = publish
        self._replicas: list[_Replica] = []
        self._events: deque[Event] = deque(maxlen=MAX_EVENTS)
        self._changed = threading.Condition()
        self._stopping = threading.Event()
        self._watcher: threading.Thread | None = None
        self._watcher_failure: BaseException | None = None
        self._publish_failure = ""
        self._started_s = 0.0

    def start(self) -> None:
        """Ask Ray for the actors and start watching them; returns at once."""
        actor_class = ray.remote(TargetServer).options(
            num_gpus=self._config.num_gpus,
            num_cpus=self._config.num_cpus,
            max_restarts=-1,
            max_task_retries=-1,
            max_concurrency=8,
        )
        self._started_s = time.monotonic()
        self._replicas = [_Replica(i, actor_class.remote(self._config)) for i in range(self._config.replicas)]
        self._watcher = threading.Thread(target=self._watch, name="target-watcher", daemon=True)
        self._watcher.start()

    def wait_ready(self, deadline_s: float) -> list[str]:
        """Wait until every target serves.

        Args:
            deadline_s: Seconds from now.

        Returns:
            The targets' addresses.

        Raises:
            PlacementError: Ray could not place a target within PLACEMENT_TIMEOUT_S.
            TargetError: A target failed to load, or targets differ.
            DeadlineError: A target is still loading at the deadline.
        """
        deadline = time.monotonic() + deadline_s
        with self._changed:
            while not all(replica.address for replica in self._replicas):
                self.check()
                for replica in self._replicas:
                    if replica.failure is not None:
                        raise replica.failure
                now = time.monotonic()
                unplaced = [replica.index for replica in self._replicas if not replica.is_placed]
                if unplaced and now - self._started_s >= PLACEMENT_TIMEOUT_S:
                    raise self._placement_error(unplaced)
                if now >= deadline:
                    waiting = [replica.index for replica in self._replicas if replica.address is None]
                    raise DeadlineError(
                        f"targets {waiting} of {len(self._replicas)} do not serve {self._config.model} after "
                        f"{deadline_s:.0f} s: not placed are {unplaced}, the others still load"
                    )
                self._changed.wait(min(deadline - now, STARTING_PING_EVERY_S))
            addresses = [replica.address for replica in self._replicas if replica.address]
        self.describe()
        return addresses

    def describe(self) -> TargetDescription:
        """What the targets are; all must say the same.

        Raises:
            TargetError: They differ, or one does not answer.
        """
        pending = [replica.actor.describe.remote() for replica in self._replicas]
        try:
            descriptions: list[TargetDescription] = ray.get(pending, timeout=ANSWER_TIMEOUT_S)
        except RayTaskError as error:
            raise _cause(error, self._config.model) from error
        except (RayActorError, ray.exceptions.GetTimeoutError) as error:
            raise TargetError(f"a target of {self._config.model} does not describe itself: {error}") from error
        if any(description != descriptions[0] for description in descriptions):
            fingerprints = [description.fingerprint for description in descriptions]
            raise TargetError(
                f"the targets serve different models (fingerprints {fingerprints}): give every node the same files "
                f"for {self._config.model}"
            )
        return descriptions[0]

    def addresses(self) -> list[str]:
        """Where targets answer right now."""
        with self._changed:
            return [replica.address for replica in self._replicas if replica.address]

    def states(self) -> list[TargetState]:
        """What each target does right now, in order of their numbers."""
        with self._changed:
            return [_state(replica) for replica in self._replicas]

    def events(self) -> list[Event]:
        """What happened since the last call: `restart`, `gone`, `failed`, `unpublished`; oldest first."""
        with self._changed:
            events = list(self._events)
            self._events.clear()
        return events

    def check(self) -> None:
        """Raise if the targets can no longer come back by themselves.

        Raises:
            TargetError: Ray gave every target up, or the watcher failed.
        """
        with self._changed:
            if self._watcher_failure is not None:
                raise TargetError(f"the watcher of the targets failed: {self._watcher_failure!r}")
            if self._replicas and all(replica.is_dead for replica in self._replicas):
                raise self._replicas[0].failure or TargetError(f"every target of {self._config.model} is gone")

    def stop(self) -> None:
        """End the watcher and the actors. Safe to call twice, and before `start`."""
        self._stopping.set()
        if self._watcher is not None:
            self._watcher.join(STOP_TIMEOUT_S)
        replicas, self._replicas = self._replicas, []
        for replica in replicas:
            ray.kill(replica.actor, no_restart=True)

    def _placement_error(self, unplaced: list[int]) -> PlacementError:
        wanted = {"GPU": self._config.num_gpus, "CPU": self._config.num_cpus}
        wanted = {name: amount for name, amount in wanted.items() if amount}
        total: dict[str, float] = ray.cluster_resources()
        free: dict[str, float] = ray.available_resources()
        figures = ", ".join(
            f"{amount:g} {name} (the cluster has {total.get(name, 0):g}, {free.get(name, 0):g} free)"
            for name, amount in wanted.items()
        )
        return PlacementError(
            f"targets {unplaced} of {len(self._replicas)} were not placed within {PLACEMENT_TIMEOUT_S:.0f} s: each "
            f"asks for {figures or 'no resource, so its process did not start in time'}. Lower target.replicas or "
            f"target.num_gpus and target.num_cpus, or add nodes"
        )

    def _watch(self) -> None:
        try:
            while not self._stopping.is_set():
                with self._changed:
                    starting = any(replica.last_address is None for replica in self._replicas)
                every_s = STARTING_PING_EVERY_S if starting else PING_EVERY_S
                next_s = time.monotonic() + every_s
                self._ping(every_s)
                self._publish_live()
                self._stopping.wait(max(0.0, next_s - time.monotonic()))
        except BaseException as error:
            with self._changed:
                self._watcher_failure = error
                self._changed.notify_all()
            raise

    def _ping(self, timeout_s: float) -> None:
        """Ask every target that has answered its last ping, and take in what came back within `timeout_s`."""
        pulses = {}
        for replica in self._replicas:
            if replica.is_dead:
                continue
            if replica.pulse is None:
                # Not retried: a restart shall show at once, and not as silence.
                replica.pulse = replica.actor.ping.options(max_task_retries=0).remote()
            pulses[replica.pulse] = replica
        answered, _ = ray.wait(list(pulses), num_returns=len(pulses), timeout=timeout_s) if pulses else ([], [])
        now = time.monotonic()
        with self._changed:
            for pulse in answered:
                replica = pulses[pulse]
                replica.pulse = None
                self._take_in(replica, pulse, now)
            for replica in self._replicas:
                if replica.address and now - replica.answered_s > SILENCE_S:
                    self._lose(replica, f"has not answered for {SILENCE_S:.0f} s")
            self._changed.notify_all()

    def _take_in(self, replica: _Replica, pulse: Any, now: float) -> None:
        try:
            address: str | None = ray.get(pulse)
        except ActorDiedError as error:
            replica.is_dead = True
            replica.failure = TargetError(f"target {replica.index} of {self._config.model} died for good: {error}")
            self._lose(replica, "died for good")
            self._record("failed", str(replica.failure))
        except RayActorError:
            self._lose(replica, "lost its process; Ray restarts it")
        except RayTaskError as error:
            replica.is_placed = True
            replica.failure = _cause(error, self._config.model)
            self._lose(replica, str(replica.failure))
            self._reload(replica, now)
        else:
            replica.is_placed = True
            replica.answered_s = now
            if address is None:
                self._lose(replica, "lost its process; the restarted one loads")
            else:
                self._welcome(replica, address)

    def _welcome(self, replica: _Replica, address: str) -> None:
        if replica.last_address not in (None, address):
            self._record("restart", f"target {replica.index} restarted and serves at {address}")
        replica.address = replica.last_address = address
        replica.failure = None

    def _lose(self, replica: _Replica, reason: str) -> None:
        if replica.address:
            self._record("gone", f"target {replica.index} at {replica.address} {reason}")
        replica.address = None

    def _reload(self, replica: _Replica, now: float) -> None:
        """Restart a target that has served before; one that never loaded would only fail again."""
        if replica.last_address is None or now - replica.restarted_s < RELOAD_PAUSE_S:
            return
        replica.restarted_s = now
        self._record("failed", f"target {replica.index} is restarted: {replica.failure}")
        ray.kill(replica.actor, no_restart=False)

    def _publish_live(self) -> None:
        addresses = self.addresses()
        try:
            self._publish(addresses)
        except SlipstreamError as error:
            if str(error) != self._publish_failure:  # once, not every second
                self._record("unpublished", f"the addresses of {len(addresses)} targets were not published: {error}")
            self._publish_failure = str(error)
        else:
            self._publish_failure = ""

    def _record(self, kind: str, message: str) -> None:
        with self._changed:
            self._events.append(Event(time_s=time.time(), kind=kind, message=message))


def _state(replica: _Replica) -> TargetState:
    """The watcher's knowledge as a record."""
    message = str(replica.failure or "")
    if replica.address:
        return TargetState(index=replica.index, state="serving", address=replica.address)
    if replica.is_dead:
        return TargetState(index=replica.index, state="failed", address=replica.last_address, message=message)
    if replica.last_address:
        return TargetState(index=replica.index, state="silent", address=replica.last_address, message=message)
    return TargetState(index=replica.index, state="loading" if replica.is_placed else "pending", message=message)


def _cause(error: RayTaskError, model: str) -> SlipstreamError:
    """The error that the actor raised."""
    if isinstance(error.cause, SlipstreamError):
        return error.cause
    return TargetError(f"a target of {model} failed: {error.cause!r}")
