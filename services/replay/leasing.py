"""How a rank leases from several tables as if they were one. No torch.

A micro-batch comes from one table where one has all of it, and is put together from several otherwise. What was leased
is kept while the rest is waited for: a shard whose limits let a single use go opens for the next capture by giving it,
and every shard can hold all that the ranks may keep at once (`trainer.preparation`), so no shard is full for good.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

from services.contracts import SampleLease, TableInfo, TableSignature
from services.errors import (
    DeadlineError,
    ReplayError,
    ReplayUnavailableError,
    SignatureError,
    StaleGenerationError,
    TableLostError,
    UnknownSampleError,
)
from services.replay.links import ShardLink, close_links, shard_of, sum_infos
from services.replay.store import ChunkReader

POLL_S = 0.01
EXHAUSTED_LOOK_S = 0.05
"""A rank that waits looks so often whether anything will come at all."""

KEPT_PART = 0.5
"""What is leased is kept for this part of its lease at most while the rest is waited for, then all is given back."""

AWAY_FACTOR = 2.0
"""A shard that took t to give no answer is left alone for so many t: the others must not wait for it each time."""


class _Ask(NamedTuple):
    """What every table is asked with."""

    rank: int
    generation: int
    lease_s: float


class Leasing:
    """One rank's leases. A prefetching and an acknowledging thread may use it at once."""

    def __init__(
        self,
        links: Sequence[ShardLink],
        prefix: str,
        signature: TableSignature,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Lease from these shards.

        Args:
            links: All shards of the run; closed with this object.
            prefix: Names the tables in errors.
            signature: What their samples must share.
            clock: Seconds, shared with the shards.
        """
        self._links = tuple(links)
        self._prefix = prefix
        self._signature = signature
        self._clock = clock
        self._checked: set[int] = set()
        self._away: dict[int, tuple[float, ReplayError]] = {}
        """Until when a shard is left alone, and why."""

    def reading(self, lease: SampleLease) -> AbstractContextManager[ChunkReader]:
        """Read the chunks of a leased sample to where they belong; good once the context has ended well.

        Checksums and finiteness were checked once, by the shard on arrival (`services.replay.arrival`); here only sizes
        are.

        Args:
            lease: From `lease`.

        Raises:
            UnknownSampleError: The sample is gone: the lease has ended.
            WireError: A chunk has another length.
            ReplayUnavailableError: The store does not answer.
        """
        return self._links[lease.shard].table.reading(lease.sample.job)

    def lease(
        self,
        *,
        rank: int,
        generation: int,
        count: int,
        lease_s: float,
        timeout_s: float,
        captures: Sequence[int] | None = None,
        cancelled: threading.Event | None = None,
    ) -> list[SampleLease]:
        """Lease a micro-batch, waiting until it is ready.

        Args:
            rank: Who leases.
            generation: Of the trainer group.
            count: How many uses. Once all tables are sealed it may be fewer, or none.
            lease_s: The leases end by themselves this much later.
            timeout_s: Longest wait.
            captures: Lease exactly these, in this order; `count` is then ignored.
            cancelled: Ends the wait early with an empty list.

        Raises:
            DeadlineError: They were not ready in time; says what the tables held.
            StaleGenerationError: The trainer group has been replaced.
            SignatureError: A table holds something else.
            ReplayUnavailableError: A Redis did not answer up to the end.
            TableLostError: There was no table up to the end.
        """
        ask, deadline_s = _Ask(rank, generation, lease_s), time.monotonic() + timeout_s
        wanted = count if captures is None else len(captures)
        taken: dict[int, SampleLease] = {}
        """By place in the micro-batch."""
        first_s = 0.0
        look_s = time.monotonic() + EXHAUSTED_LOOK_S
        try:
            while True:
                had_some = bool(taken)
                if captures is None:
                    failure = self._take_any(ask, wanted, taken)
                else:
                    failure = self._take_named(ask, captures, taken)
                now_s = time.monotonic()
                if len(taken) == wanted or (len(self._links) == 1 and taken):
                    return [taken[place] for place in sorted(taken)]
                if now_s >= min(look_s, deadline_s):
                    look_s = now_s + EXHAUSTED_LOOK_S
                    if captures is None and failure is None and self._is_exhausted():
                        return [taken[place] for place in sorted(taken)]
                if not had_some:
                    first_s = now_s
                if now_s >= deadline_s:
                    raise failure or self._too_late(wanted, timeout_s, captures)
                if taken and now_s > first_s + KEPT_PART * lease_s:
                    self.drop(taken.values(), generation)
                    taken.clear()
                if cancelled is None:
                    time.sleep(POLL_S)
                elif cancelled.wait(POLL_S):
                    self.drop(taken.values(), generation)
                    return []
        except BaseException:
            self.drop(taken.values(), generation)
            raise

    def ack(self, leases: Sequence[SampleLease], generation: int, *, timeout_s: float = 0.0) -> None:
        """End leases after the backward pass that used their samples; the last use of a sample frees its bytes.

        Leases of a table that is no more have ended with it.

        Args:
            leases: From one call of `lease`.
            generation: Of the trainer group.
            timeout_s: How long to wait for a Redis that does not answer.

        Raises:
            StaleGenerationError: The trainer group has been replaced.
            UnknownSampleError: A lease is not held any more. Nothing is changed in its table.
            ReplayUnavailableError: Redis did not answer in time.
        """
        deadline_s = time.monotonic() + timeout_s
        for link, own in self._by_shard(leases):
            self._ack_one(link, own, generation, deadline_s)

    def release(self, leases: Sequence[SampleLease], generation: int) -> None:
        """Give back leases whose samples were not used.

        Raises:
            StaleGenerationError: The trainer group has been replaced.
            UnknownSampleError: A lease is not held any more. Nothing is changed in its table.
        """
        for link, own in self._by_shard(leases):
            link.table.release(own, generation)

    def drop(self, leases: Iterable[SampleLease], generation: int) -> None:
        """Give back what is still held of these; the others have ended with their table or their group."""
        for link, own in self._by_shard(leases):
            for lease in own:
                with contextlib.suppress(
                    ReplayUnavailableError, TableLostError, UnknownSampleError, StaleGenerationError
                ):
                    link.table.release([lease], generation)

    def are_lost(self, leases: Iterable[SampleLease], deadline_s: float) -> bool:
        """Whether a table that gave one of these leases is no more; waits until each Redis answers.

        Args:
            leases: From `lease`.
            deadline_s: Of `time.monotonic`.

        Raises:
            ReplayUnavailableError: One does not up to the deadline.
        """
        return any(self._is_lost(link, own, deadline_s) for link, own in self._by_shard(leases))

    def update_priorities(self, rejections: Mapping[int, float]) -> None:
        """Note how much of the drafts for some captures' samples was rejected: what `prioritized` draws by.

        Args:
            rejections: By capture, from 0 to 1. Samples that are used up are passed over.

        Raises:
            ReplayUnavailableError: A Redis does not answer; the other shards have heard.
            TableLostError: Likewise, for a table that is not there.
        """
        failure: ReplayError | None = None
        for link in self._links:
            try:
                link.table.update_priorities(rejections)
            except (ReplayUnavailableError, TableLostError) as error:
                failure = error
        if failure is not None:
            raise failure

    def close(self) -> None:
        """Close the connections."""
        close_links(self._links)

    def _take_any(self, ask: _Ask, wanted: int, taken: dict[int, SampleLease]) -> ReplayError | None:
        """Lease what there is of a micro-batch; what a shard failed with, if one did."""
        links, failure = self._in_order()
        for is_whole in (True, False):
            for link in links:
                while missing := wanted - len(taken):
                    leases, error = self._ask_one(link, ask, missing if is_whole else 1)
                    failure = failure or error
                    taken.update(enumerate(leases, start=len(taken)))
                    if is_whole or not leases:
                        break
            if len(links) == 1:
                break
        return failure

    def _take_named(self, ask: _Ask, captures: Sequence[int], taken: dict[int, SampleLease]) -> ReplayError | None:
        """Lease the captures that are not leased yet, those of each shard together."""
        failure = None
        for link in self._links:
            places = [
                place
                for place, capture in enumerate(captures)
                if place not in taken and shard_of(capture, len(self._links)) == link.number
            ]
            if places:
                leases, error = self._ask_one(link, ask, 0, [captures[place] for place in places])
                failure = failure or error
                taken.update(zip(places, leases, strict=False))  # all of them or none
        return failure

    def _ask_one(
        self, link: ShardLink, ask: _Ask, count: int, captures: Sequence[int] | None = None
    ) -> tuple[list[SampleLease], ReplayError | None]:
        """Ask one table; where Redis is being restarted, what it held is captured again."""
        if error := self._is_left_alone(link):
            return [], error
        began_s = time.monotonic()
        try:
            self._check_signature(link)
            leases = link.table.lease(
                rank=ask.rank,
                generation=ask.generation,
                count=count,
                now_s=self._clock(),
                lease_s=ask.lease_s,
                captures=captures,
            )
        except (ReplayUnavailableError, TableLostError) as error:
            self._note_away(link, began_s, error)
            return [], error
        if link.number:
            leases = [lease.model_copy(update={"shard": link.number}) for lease in leases]
        return leases, None

    def _in_order(self) -> tuple[list[ShardLink], ReplayError | None]:
        """Local shards first, then those with the most bytes."""
        if len(self._links) == 1:
            return list(self._links), None
        failure: ReplayError | None = None
        resident_bytes: dict[int, int] = {}
        for link in self._links:
            if error := self._is_left_alone(link):
                failure = error
                continue
            began_s = time.monotonic()
            try:
                resident_bytes[link.number] = link.table.info().resident_bytes
            except (ReplayUnavailableError, TableLostError) as error:
                failure = error
                self._note_away(link, began_s, error)
        links = [link for link in self._links if link.number in resident_bytes]
        return sorted(links, key=lambda link: (not link.is_local, -resident_bytes[link.number])), failure

    def _note_away(self, link: ShardLink, began_s: float, error: ReplayError) -> None:
        if len(self._links) > 1:
            now_s = time.monotonic()
            self._away[link.number] = now_s + AWAY_FACTOR * (now_s - began_s), error

    def _is_left_alone(self, link: ShardLink) -> ReplayError | None:
        """What a shard failed with just now, if it is not asked again yet."""
        until_s, error = self._away.get(link.number, (0.0, None))
        return error if time.monotonic() < until_s else None

    def _check_signature(self, link: ShardLink) -> None:
        if link.number in self._checked:
            return
        signature = link.table.signature()
        if signature is not None and signature != self._signature:
            raise SignatureError(
                f"the replay table {self._prefix!r} holds {signature.model_dump_json()}, this reader expects "
                f"{self._signature.model_dump_json()}: both must come from the same recipe"
            )
        if signature is not None:
            self._checked.add(link.number)

    def _ack_one(self, link: ShardLink, leases: Sequence[SampleLease], generation: int, deadline_s: float) -> None:
        may_be_acked = False
        while True:
            try:
                link.table.ack(leases, generation, self._clock())
                return
            except (TableLostError, UnknownSampleError):
                if may_be_acked or self._is_lost(link, leases, deadline_s):
                    return
                raise
            except ReplayUnavailableError:
                if time.monotonic() >= deadline_s:
                    raise
                may_be_acked = True  # only the answer may have got lost
                time.sleep(POLL_S)

    def _is_lost(self, link: ShardLink, leases: Sequence[SampleLease], deadline_s: float) -> bool:
        while True:
            try:
                return any(lease.incarnation != link.table.incarnation() for lease in leases)
            except ReplayUnavailableError:
                if time.monotonic() >= deadline_s:
                    raise
                time.sleep(POLL_S)

    def _is_exhausted(self) -> bool:
        """Whether nothing is ready and nothing more will come; not while a table is away."""
        try:
            infos = self._infos()
        except (ReplayUnavailableError, TableLostError):
            return False
        return all(info.sealed and info.num_ready == 0 for info in infos)

    def _infos(self) -> list[TableInfo]:
        return [link.table.info() for link in self._links]

    def _by_shard(self, leases: Iterable[SampleLease]) -> list[tuple[ShardLink, list[SampleLease]]]:
        groups: dict[int, list[SampleLease]] = {}
        for lease in leases:
            groups.setdefault(lease.shard, []).append(lease)
        return [(self._links[number], own) for number, own in groups.items()]

    def _too_late(self, count: int, timeout_s: float, captures: Sequence[int] | None) -> DeadlineError:
        info = sum_infos(self._infos())
        wanted = f"captures {list(captures)}" if captures is not None else f"{count} samples"
        return DeadlineError(
            f"{wanted} were not ready in the replay table {self._prefix!r} after {timeout_s:g} s: {info.num_ready} "
            f"ready, {info.num_leased} leased, {info.num_inserting} being captured, {info.resident_bytes} of "
            f"{info.capacity_bytes} bytes resident. Look at the targets; if the buffer is full, raise replay.capacity."
        )
