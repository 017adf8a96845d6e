"""The driver's side of the targets: starts and ends the actors, watches them, publishes who answers."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import (
    ActorDiedError,
    ActorUnschedulableError,
    RayActorError,
    RayTaskError,
    RuntimeEnvSetupError,
)

from services.contracts import Event, TargetDescription, TargetState
from services.errors import DeadlineError, PlacementError, SlipstreamError, TargetError, UsageError
from services.logs import LogPlace, logged
from services.placement import alive_nodes
from services.target.actor import TargetServer
from services.target.config import TargetConfig
from services.target.listening import Listening
from services.target.replica import MOST_QUARANTINES, QUARANTINES_S, Replica, choose_to_end

PLACEMENT_TIMEOUT_S = 60.0
"""A target of a run's start that is not placed by then, because a resource is taken, ends the run. Where nothing is
missing its process is still being started, which on a busy machine takes as long."""

PING_EVERY_S = 1.0
"""How often every target is asked, and the addresses of those that answer are published."""

STARTING_PING_EVERY_S = 0.2
"""The same while a target starts, so that it is used at once."""

BUSY_AFTER_S = 15.0
"""A target that is not placed by then waits for a resource that others hold. Earlier its process may just be starting,
and the resource that looks taken is its own."""

UNPUBLISHED_S = 2.0
"""A target that shall end turns captures away for so long before it answers no more: shards may just have chosen it."""

DRAIN_DEADLINE_S = 120.0
"""How long the captures of a target that shall end may still run."""

SILENCE_S = 5.0
"""A target that has not answered a ping for this long is published no more, until it does."""

RELOAD_PAUSE_S = 30.0
"""Least time between two restarts of a target that came up and then failed to load or compute."""

ANSWER_TIMEOUT_S = 30.0
"""How long a serving target may take to describe itself."""

STOP_TIMEOUT_S = 10.0
"""How long the watcher may take to notice that it shall end."""

MAX_EVENTS = 1000
"""Events kept for the driver; the oldest are dropped."""


class TargetPool:
    """N target actors that restart by themselves, and a thread that publishes the addresses of those that answer.

    Args:
        config: What each target is and how many there are.
        publish: Called about once a second with the live addresses, from the watcher's thread. It returns those that
            are quarantined, and why: they are restarted. A SlipstreamError that it raises becomes an event; the next
            call tries again.
        log: Where the targets log to, each in a file with its index.
        listening: Where they serve, and with whose credentials; None is the loopback interface of their machines, open
            to everyone there.
    """

    def __init__(
        self,
        config: TargetConfig,
        publish: Callable[[Sequence[str]], Mapping[str, str]],
        log: LogPlace | None = None,
        listening: Listening | None = None,
    ) -> None:
        self._config = config
        self._listening = listening
        self._log = log
        self._publish = publish
        self._replicas: list[Replica] = []
        self._next_index = 0
        self._events: deque[Event] = deque(maxlen=MAX_EVENTS)
        self._changed = threading.Condition()
        self._stopping = threading.Event()
        self._wake = threading.Event()
        self._watcher: threading.Thread | None = None
        self._watcher_failure: BaseException | None = None
        self._publish_failure = ""

    def start(self) -> None:
        """Ask Ray for the actors and start watching them; returns at once."""
        with self._changed:
            self._add(self._config.replicas)
        self._watcher = threading.Thread(target=self._watch, name="target-watcher", daemon=True)
        self._watcher.start()

    def wait_ready(self, deadline_s: float, look: Callable[[], None] = lambda: None) -> list[str]:
        """Wait until every target serves: of a run that starts, all must.

        Args:
            deadline_s: Seconds from now.
            look: Called several times a second while waiting; what it raises ends the wait.

        Returns:
            The targets' addresses.

        Raises:
            PlacementError: Ray could not place a target within PLACEMENT_TIMEOUT_S for want of a resource.
            TargetError: A target failed to load, or targets differ.
            DeadlineError: A target is still loading at the deadline.
        """
        deadline = time.monotonic() + deadline_s
        while not self._is_ready(deadline, deadline_s):
            look()
            with self._changed:
                self._changed.wait(STARTING_PING_EVERY_S)
        self.describe()
        return self.addresses()

    def describe(self) -> TargetDescription:
        """What the serving targets are; all must say the same.

        Raises:
            TargetError: They differ, one does not answer, or none serves.
        """
        with self._changed:
            pending = [replica.actor.describe.remote() for replica in self._replicas if replica.address]
        if not pending:
            raise TargetError(f"no target of {self._config.model} serves")
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
            return [replica.address for replica in self._replicas if replica.address and not replica.is_draining]

    def states(self) -> list[TargetState]:
        """What each target does right now, in order of their numbers."""
        with self._changed:
            return [replica.record() for replica in self._replicas]

    @property
    def _num_wanted(self) -> int:
        """Targets that shall serve, as far as the cluster places them."""
        with self._changed:
            return sum(not replica.is_draining for replica in self._replicas)

    def scale(self, replicas: int, reason: str = "") -> None:
        """Have another number of targets; returns at once.

        New ones load by themselves and are used as soon as they serve; one that the cluster cannot place is pending and
        comes up when the resource appears. Down, those that give nothing end first; one that serves is published no
        more and ends when its captures have finished, or after `DRAIN_DEADLINE_S`. A target that failed to load is
        replaced by a new one.

        Args:
            replicas: How many.
            reason: Why, for the event that says so.

        Raises:
            UsageError: The number is below 1 or above `target.max_replicas`; nothing is changed.
        """
        most = self._config.max_replicas
        if not 1 <= replicas <= most:
            raise UsageError(
                f"targets={replicas} must lie between 1 and target.max_replicas {most} of this run: pause the run to "
                "use no target, or set target.max_replicas in its recipe to allow more"
            )
        with self._changed:
            before = self._num_wanted
            num_failed = sum(replica.state == "failed" for replica in self._replicas)
            ending = choose_to_end(self._replicas, max(num_failed, before - replicas))  # the failed ones come first
            draining = [replica for replica in ending if replica.state == "serving"]
            for replica in draining:
                replica.drained_from_s = time.monotonic()
                replica.actor.turn_away.options(max_task_retries=0).remote()
            killed = [replica for replica in ending if replica not in draining]
            self._replicas = [replica for replica in self._replicas if replica not in killed]
            self._add(replicas - self._num_wanted)
            if replicas != before or num_failed:
                what = f"targets scaled from {before} to {replicas}"
                replaced = f", {num_failed} failed ones ended" if num_failed else ""
                self._record("scaling", f"{what}{replaced}" + (f": {reason}" if reason else ""))
            self._changed.notify_all()
        for replica in killed:
            ray.kill(replica.actor, no_restart=True)
        self._wake.set()

    def events(self) -> list[Event]:
        """What happened since the last call, oldest first.

        Kinds: `restart`, `gone`, `quarantined`, `failed`, `unpublished`, `scaling`, `pending`, `serving` (an added
        one), `drained`.
        """
        with self._changed:
            events = list(self._events)
            self._events.clear()
        return events

    def check(self) -> None:
        """Raise if the targets can no longer come back by themselves.

        Raises:
            TargetError: No target will come back by itself, or the watcher failed.
        """
        with self._changed:
            if self._watcher_failure is not None:
                raise TargetError(f"the watcher of the targets failed: {self._watcher_failure!r}")
            if self._replicas and all(replica.is_dead for replica in self._replicas):
                raise self._replicas[0].failure or TargetError(f"every target of {self._config.model} is gone")

    def stop(self) -> None:
        """End the watcher and the actors. Safe to call twice, and before `start`."""
        self._stopping.set()
        self._wake.set()
        if self._watcher is not None:
            self._watcher.join(STOP_TIMEOUT_S)
        with self._changed:
            replicas, self._replicas = self._replicas, []
        for replica in replicas:
            ray.kill(replica.actor, no_restart=True)

    def _add(self, count: int) -> None:
        """Ask Ray for more actors; the lock is held."""
        options = {"max_restarts": -1, "max_task_retries": -1, "max_concurrency": 8, **self._config.ask.options()}
        for _ in range(count):
            place = self._log.model_copy(update={"rank": self._next_index}) if self._log else None
            actor_class: Any = ray.remote(logged(TargetServer, place) if place else TargetServer)
            actor = actor_class.options(**options).remote(self._config, self._listening)
            is_added = self._watcher is not None
            self._replicas.append(Replica(self._next_index, actor, asked_s=time.monotonic(), is_added=is_added))
            self._next_index += 1

    def _is_ready(self, deadline: float, deadline_s: float) -> bool:
        """Whether every target that was started with the run serves; raises as `wait_ready` does."""
        self.check()
        now = time.monotonic()
        with self._changed:
            first = [replica for replica in self._replicas if not replica.is_added and not replica.is_draining]
            for replica in first:
                if replica.failure is not None:
                    raise replica.failure
            unplaced = [replica for replica in first if not replica.is_placed]
            if any(now - replica.asked_s >= PLACEMENT_TIMEOUT_S for replica in unplaced):
                self._check_resources([replica.index for replica in unplaced])
            waiting = [replica.index for replica in first if replica.address is None]
            if waiting and now >= deadline:
                raise DeadlineError(
                    f"targets {waiting} of {len(first)} do not serve {self._config.model} after {deadline_s:.0f} s: "
                    f"not placed are {[replica.index for replica in unplaced]}, the others still load"
                )
        return not waiting

    def _check_resources(self, unplaced: list[int]) -> None:
        """Raise `PlacementError` if targets that are not placed wait for a resource."""
        why = self._config.ask.why_not_now(alive_nodes(), ray.available_resources())
        if why:
            raise PlacementError(
                f"targets {unplaced} of {len(self._replicas)} were not placed within {PLACEMENT_TIMEOUT_S:.0f} s: each "
                f"asks for {why}. Lower target.replicas or what each target asks for (target.num_gpus, num_cpus, "
                "resources, labels), or add nodes"
            )

    def _watch(self) -> None:
        try:
            while not self._stopping.is_set():
                now_s = time.monotonic()
                with self._changed:
                    starting = any(replica.starts(now_s - PLACEMENT_TIMEOUT_S) for replica in self._replicas)
                every_s = STARTING_PING_EVERY_S if starting else PING_EVERY_S
                next_s = now_s + every_s
                self._ping(every_s)
                self._look_at_pending()
                published_s = time.monotonic()
                self._publish_live()
                self._drain(published_s)
                self._wake.wait(max(0.0, next_s - time.monotonic()))
                self._wake.clear()
        except BaseException as error:
            with self._changed:
                self._watcher_failure = error
                self._changed.notify_all()
            raise

    def _ping(self, timeout_s: float) -> None:
        """Ask every target that has answered its last ping, and take in what came back within `timeout_s`."""
        with self._changed:
            asked = [replica for replica in self._replicas if not replica.is_dead and not replica.is_draining]
        pulses = {}
        for replica in asked:
            if replica.pulse is None:
                # Not retried: a restart shall show at once, and not as silence.
                replica.pulse = replica.actor.ping.options(max_task_retries=0).remote()
                replica.pinged_s = time.monotonic()
            pulses[replica.pulse] = replica
        answered, _ = ray.wait(list(pulses), num_returns=len(pulses), timeout=timeout_s) if pulses else ([], [])
        now = time.monotonic()
        with self._changed:
            for pulse in answered:
                replica = pulses[pulse]
                replica.pulse = None
                if replica in self._replicas and not replica.is_draining:  # `scale` may have ended it meanwhile
                    self._take_in(replica, pulse, now)
            for replica in asked:
                # Counted from the ping: the watcher itself may have stood still since the last answer.
                is_silent = replica.pulse is not None and now - replica.pinged_s > SILENCE_S
                if is_silent and replica.address and not replica.is_draining:
                    self._lose(replica, f"has not answered for {SILENCE_S:.0f} s")
            self._changed.notify_all()

    def _look_at_pending(self) -> None:
        """Say of every target that is not placed what it waits for."""
        with self._changed:
            pending = [replica for replica in self._replicas if not (replica.is_placed or replica.is_dead)]
        if not pending:
            return
        nodes, free, ask = alive_nodes(), ray.available_resources(), self._config.ask
        never, not_now = ask.why_never(nodes), ask.why_not_now(nodes, free)
        now = time.monotonic()
        with self._changed:
            for replica in pending:
                missing = never or (not_now if now - replica.asked_s > BUSY_AFTER_S else "")
                if missing and not replica.missing:
                    self._record(
                        "pending",
                        f"target {replica.index} waits for {missing}; it comes up when the cluster has room",
                    )
                if replica.missing and not missing:
                    replica.asked_s = now  # Ray begins to place it: what looks taken next may be its own
                replica.missing = missing

    def _drain(self, published_s: float) -> None:
        """End the targets that shall end, once their captures have finished.

        Args:
            published_s: When the addresses were last published, without theirs.
        """
        with self._changed:
            draining = [replica for replica in self._replicas if replica.is_draining]
        for replica in draining:
            assert replica.drained_from_s is not None
            if replica.farewell is None:
                if published_s - replica.drained_from_s > UNPUBLISHED_S:
                    replica.farewell = replica.actor.drain.options(max_task_retries=0).remote(DRAIN_DEADLINE_S)
                continue
            finished, _ = ray.wait([replica.farewell], timeout=0)
            drained_s = time.monotonic() - replica.drained_from_s
            if not finished and drained_s < DRAIN_DEADLINE_S + PING_EVERY_S:
                continue
            ray.kill(replica.actor, no_restart=True)
            how = "" if finished else f"; captures that ran for more than {DRAIN_DEADLINE_S:g} s were cut off"
            with self._changed:
                self._replicas = [other for other in self._replicas if other is not replica]
                self._record("drained", f"target {replica.index} at {replica.last_address} has ended{how}")

    def _take_in(self, replica: Replica, pulse: Any, now: float) -> None:
        """Note what a ping came back with; the lock is held."""
        try:
            address: str | None = ray.get(pulse)
        except (ActorDiedError, ActorUnschedulableError, RuntimeEnvSetupError) as error:
            self._give_up(replica, TargetError(f"a target of {self._config.model} died for good: {error}"))
        except RayActorError:
            replica.banned_address = None
            if replica.is_placed:
                replica.is_placed, replica.asked_s = False, now
            self._lose(replica, "lost its process; Ray restarts it")
        except RayTaskError as error:
            replica.is_placed, replica.missing = True, ""
            failure = _cause(error, self._config.model)
            if replica.last_address:
                replica.failure = failure
                self._lose(replica, str(failure))
                self._reload(replica, now)
            else:  # it would only fail again, and hold what it was given
                self._give_up(replica, failure)
        else:
            replica.is_placed, replica.missing = True, ""
            if address is None:
                replica.banned_address = None
                self._lose(replica, "lost its process; the restarted one loads")
            elif address != replica.banned_address:
                self._welcome(replica, address)

    def _welcome(self, replica: Replica, address: str) -> None:
        if replica.address not in (None, address):  # it was back before the watcher looked
            self._lose(replica, "lost its process; Ray restarted it")
        if replica.last_address not in (None, address):
            self._record("restart", f"target {replica.index} restarted and serves at {address}")
        elif replica.last_address is None and replica.is_added:
            self._record("serving", f"target {replica.index} serves at {address}")
        replica.address = replica.last_address = address
        replica.failure, replica.lost, replica.quarantine = None, "", ""

    def _give_up(self, replica: Replica, failure: SlipstreamError) -> None:
        """End a target that will not serve; it stays in sight as failed until `scale` replaces it."""
        replica.is_dead, replica.failure = True, failure
        self._lose(replica, "has failed")
        self._record("failed", f"target {replica.index} has failed: {failure}")
        ray.kill(replica.actor, no_restart=True)

    def _lose(self, replica: Replica, reason: str) -> None:
        if replica.address:
            self._record("gone", f"target {replica.index} at {replica.address} {reason}")
        replica.address = None
        if replica.last_address:
            replica.lost = reason

    def _reload(self, replica: Replica, now: float) -> None:
        """Restart a target that has served before."""
        if now - replica.restarted_s < RELOAD_PAUSE_S:
            return
        replica.restarted_s = now
        self._record("failed", f"target {replica.index} is restarted: {replica.failure}")
        ray.kill(replica.actor, no_restart=False)

    def _publish_live(self) -> None:
        addresses = self.addresses()
        try:
            quarantined = self._publish(addresses)
        except SlipstreamError as error:
            if str(error) != self._publish_failure:  # once, not every second
                self._record("unpublished", f"the addresses of {len(addresses)} targets were not published: {error}")
            self._publish_failure = str(error)
        else:
            self._publish_failure = ""
            self._restart_quarantined(quarantined)

    def _restart_quarantined(self, reasons: Mapping[str, str]) -> None:
        """Restart the targets that answer wrongly, unless that has not helped before."""
        now_s = time.monotonic()
        with self._changed:
            for replica in self._replicas:
                reason = reasons.get(replica.address or "")
                if reason is None or replica.is_draining:
                    continue
                where = f"target {replica.index} at {replica.address}"
                if replica.ban(reason, now_s):
                    self._record("quarantined", f"{where} answers wrongly and is restarted: {reason}")
                    ray.kill(replica.actor, no_restart=False)
                else:
                    self._give_up(
                        replica,
                        TargetError(
                            f"it answered wrongly again after {MOST_QUARANTINES} restarts within "
                            f"{QUARANTINES_S / 60:g} minutes: {reason}. Look at its model's files and at its device"
                        ),
                    )
            self._changed.notify_all()

    def _record(self, kind: str, message: str) -> None:
        with self._changed:
            self._events.append(Event(time_s=time.time(), kind=kind, message=message))


def _cause(error: RayTaskError, model: str) -> SlipstreamError:
    """The error that the actor raised."""
    if isinstance(error.cause, SlipstreamError):
        return error.cause
    return TargetError(f"a target of {model} failed: {error.cause!r}")
