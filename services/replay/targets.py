"""Which target a capture is pulled from: the least busy one that answers and gives what the table holds."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from services.contracts import CaptureJob, Chunk, TableSignature, TargetDescription, WireDtype
from services.errors import SignatureError, WireError

DESCRIBE_TIMEOUT_S = 30.0
"""Two descriptions that do not come in time have a target restarted: a busy machine must not be taken for a hanging
one."""

FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 8.0
"""A target that failed is left alone, twice as long after each failure, so that a dead one is not asked all along."""

BUSY_PAUSE_S = 0.1
"""A target that serves as many captures as it can is asked again so much later."""

NOBODY: Mapping[str, float] = {}


class CaptureClient(Protocol):
    """What a shard needs of a target; `services.target.client.TargetClient` is one."""

    def describe(self, timeout_s: float) -> TargetDescription:
        """What the target is."""

    def capture(
        self,
        job: CaptureJob,
        *,
        layer_ids: Sequence[int],
        wire_dtype: WireDtype,
        chunk_bytes: int,
        timeout_s: float,
        first_chunk_s: float,
        progress_s: float,
        on_answer: Callable[[Sequence[int]], None] | None = None,
    ) -> Iterator[tuple[Chunk, memoryview]]:
        """The chunks of one capture; before them the target's answer, if it was to give one.

        Raises TargetStalledError if the first chunk does not come within `first_chunk_s`, or a later one within
        `progress_s`.
        """

    def close(self) -> None:
        """Close the connection."""


def check_description(description: TargetDescription, signature: TableSignature) -> None:
    """Check that a target's features belong into a table.

    Raises:
        SignatureError: It is another model, has another width, or lacks a layer.
    """
    wanted = (signature.fingerprint, signature.hidden_size)
    given = (description.fingerprint, description.hidden_size)
    if wanted != given:
        raise SignatureError(
            f"target {description.model_name} has fingerprint {given[0]} and hidden size {given[1]}, the replay table "
            f"holds features of fingerprint {wanted[0]} and hidden size {wanted[1]}: all targets of a run must serve "
            "the same weights"
        )
    too_high = [layer for layer in signature.layer_ids if layer >= description.num_layers]
    if too_high:
        raise SignatureError(
            f"target {description.model_name} has {description.num_layers} layers, the replay table wants {too_high}"
        )


@dataclass
class _Target:
    client: CaptureClient | None = None
    retired: list[CaptureClient] = field(default_factory=list)
    """Clients not to be used again; closed when the last capture has left, since closing cuts captures off."""
    num_busy: int = 0
    pause_s: float = 0.0
    paused_until_s: float = 0.0

    def take_clients(self) -> list[CaptureClient]:
        """All its clients, which it has no more."""
        clients = [*self.retired, *([self.client] if self.client is not None else [])]
        self.client, self.retired = None, []
        return clients


class Targets:
    """The targets a shard knows. Threads may share it; time and the list of live addresses are passed in."""

    def __init__(self, signature: TableSignature, connect: Callable[[str], CaptureClient]) -> None:
        """Know no target yet.

        Args:
            signature: What a target's features must be.
            connect: Makes the client of an address.
        """
        self._signature = signature
        self._connect = connect
        self._lock = threading.Lock()
        self._targets: dict[str, _Target] = {}

    def choose(self, live: Sequence[str], now_s: float, shunned_until_s: Mapping[str, float] = NOBODY) -> str | None:
        """Take a place at the least busy live target that is not paused; `leave` gives it back.

        Targets that are live no more are forgotten, with their clients, once nothing is pulled from them.

        Args:
            live: Addresses of targets that answer.
            now_s: The time.
            shunned_until_s: Targets that failed this capture, and until when none of them is chosen for it; later, too,
                any other is preferred.

        Returns:
            Its address, or None: there is none now.
        """
        self.forget_all_but(live)
        with self._lock:
            known = [(address, self._targets.setdefault(address, _Target())) for address in live]
            free = [
                (address in shunned_until_s, target.num_busy, address)
                for address, target in known
                if target.paused_until_s <= now_s and shunned_until_s.get(address, now_s) <= now_s
            ]
            if not free:
                return None
            address = min(free)[-1]
            self._targets[address].num_busy += 1
            return address

    def leave(self, address: str) -> None:
        """Give back the place that `choose` took."""
        with self._lock:
            target = self._targets[address]
            target.num_busy -= 1
            closable: list[CaptureClient] = []
            if target.num_busy == 0:
                closable, target.retired = target.retired, []
        for client in closable:
            client.close()

    def client(self, address: str) -> CaptureClient:
        """The target's client; the first use asks it what it is.

        Raises:
            TargetUnavailableError: It does not answer.
            SignatureError: It speaks another wire version, or its features do not belong into the table.
        """
        with self._lock:
            known = self._targets[address].client
        if known is not None:
            return known
        client = self._connect(address)
        try:
            check_description(client.describe(DESCRIBE_TIMEOUT_S), self._signature)
        except WireError as error:
            client.close()
            raise SignatureError(str(error)) from error
        except BaseException:
            client.close()
            raise
        with self._lock:
            target = self._targets[address]
            if target.client is None:
                target.client = client
                return client
            other = target.client
        client.close()
        return other

    def succeeded(self, address: str) -> None:
        """Note a capture that went well."""
        with self._lock:
            self._targets[address].pause_s = 0.0

    def failed(self, address: str, now_s: float) -> bool:
        """Note a failure: leave the target alone for a while, then ask it again what it is (it may have restarted).

        Returns:
            False if it is left alone already: other captures fell with the same target.
        """
        with self._lock:
            target = self._targets[address]
            if target.paused_until_s > now_s:
                return False
            target.pause_s = min(max(2 * target.pause_s, FIRST_PAUSE_S), LONGEST_PAUSE_S)
            target.paused_until_s = now_s + target.pause_s
            if target.client is not None:
                target.retired.append(target.client)
                target.client = None
            return True

    def busy(self, address: str, now_s: float) -> None:
        """Note that the target is full: leave it alone for a moment."""
        with self._lock:
            target = self._targets[address]
            target.paused_until_s = max(target.paused_until_s, now_s + BUSY_PAUSE_S)

    def close(self) -> None:
        """Close all clients; captures that run end with TargetUnavailableError."""
        with self._lock:
            clients = [client for target in self._targets.values() for client in target.take_clients()]
        for client in clients:
            client.close()

    def forget_all_but(self, live: Sequence[str]) -> None:
        """Forget targets that are not live, once nothing is pulled from them."""
        with self._lock:
            gone = [address for address, target in self._targets.items() if address not in live and not target.num_busy]
            clients = [client for address in gone for client in self._targets.pop(address).take_clients()]
        for client in clients:
            client.close()
