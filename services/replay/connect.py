"""Connections to Redis: clear errors, no password in any message, and what a server must offer."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self

import redis
from redis.backoff import NoBackoff
from redis.connection import PythonRespSerializer
from redis.retry import Retry

from services.errors import ReplayError, ReplayUnavailableError
from services.replay.keys import table_key
from services.replay.scripts import Scripts
from services.replay.urls import PASSWORD_VARIABLE, reachable, safe_url, split_arena

logger = logging.getLogger(__name__)

TIMEOUT_S = 10.0
"""Longest wait for one answer of Redis; a blocking read must ask for less."""

HEADROOM = 0.15
"""Part of `maxmemory` that must stay free of features: metadata, buffers of connections, allocator waste."""

CLAIM_TTL_S = 30.0
RENEWALS_A_TTL = 3

OUT_OF_MEMORY = "OOM command not allowed"

PACK_INLINE_BYTES = 6000
"""Longer arguments are sent as they lie in memory. It is redis-py's own bound."""


class Client(redis.Redis):
    """redis-py's client whose failures are ReplayErrors that name the server.

    A command is never sent twice by itself: an ack whose answer got lost must not look like a replayed one.
    """

    url: str
    arena: str | None = None
    """What the URL says of shared memory (`services.replay.tiers`)."""

    def execute_command(self, *args: Any, **options: Any) -> Any:
        """Send one command.

        Raises:
            ReplayUnavailableError: Redis does not answer, or refuses the login.
            ReplayError: Redis is at its `maxmemory`, or forbids the command to this user.
        """
        with translated(self.url):
            return super().execute_command(*args, **options)  # type: ignore[no-untyped-call]


@contextlib.contextmanager
def translated(url: str) -> Iterator[None]:
    """Have redis-py's errors say what to do, as `Client` raises them."""
    try:
        yield
    except redis.exceptions.AuthenticationError as error:
        raise ReplayUnavailableError(
            f"Redis at {safe_url(url)} refuses the login: {error}. Give the user in replay.redis, as in "
            f"redis://user@host:6379/0, and the password in the environment variable {PASSWORD_VARIABLE}."
        ) from error
    except redis.exceptions.NoPermissionError as error:
        raise ReplayError(
            f"Redis at {safe_url(url)} forbids what the replay buffer needs: {error}. Its user needs the keys "
            "~slipstream:* and the commands +@all -@dangerous +info."
        ) from error
    except (redis.exceptions.ConnectionError, redis.exceptions.TimeoutError) as error:
        raise ReplayUnavailableError(
            f"Redis at {safe_url(url)} does not answer: {error}. Check replay.redis, and that the server runs and "
            "can be reached from here."
        ) from error
    except redis.exceptions.ResponseError as error:
        # Before version 7 a script's own error only quotes that of the command.
        if not isinstance(error, redis.exceptions.OutOfMemoryError) and OUT_OF_MEMORY not in str(error):
            raise
        raise ReplayError(
            f"Redis at {safe_url(url)} is at its maxmemory although the replay buffer is within its capacity: other "
            "data takes the space. Raise maxmemory, lower replay.capacity, or use a Redis of its own."
        ) from error


def connect(url: str, *, timeout_s: float = TIMEOUT_S) -> Client:
    """Connect and check that the server answers.

    Args:
        url: `redis://`, `rediss://` or `unix://`, as `EmbeddedRedis.url` or the user gives it.
        timeout_s: Longest wait for the connection, and later for any one answer.

    Raises:
        ReplayError: The URL is none of these.
        ReplayUnavailableError: The server does not answer.
    """
    url, arena = split_arena(url)
    url = reachable(url)
    try:
        client = Client.from_url(
            url,
            socket_timeout=timeout_s,
            socket_connect_timeout=timeout_s,
            retry=Retry(NoBackoff(), 0),
            protocol=2,
            # hiredis' packer is five times slower on the memoryviews that chunks are.
            command_packer=PythonRespSerializer(PACK_INLINE_BYTES, _encode),
        )
    except ValueError:
        # Without redis-py's own text and the error itself: they may quote a part of the password.
        raise ReplayError(
            f"replay.redis {safe_url(url)!r} is no Redis URL. It looks like redis://host:6379/0, rediss://host:6379/0 "
            "or unix:///path/to/redis.sock, or is the word 'embedded'; special characters of a password in it are "
            f"percent-encoded, those in {PASSWORD_VARIABLE} are not."
        ) from None
    assert isinstance(client, Client)
    client.url, client.arena = url, arena
    client.ping()
    return client


def _encode(value: str | int | float | bytes | memoryview) -> bytes | memoryview:
    if isinstance(value, bytes | memoryview):
        return value
    return value.encode() if isinstance(value, str) else repr(value).encode()


def check_server(client: redis.Redis, capacity_bytes: int, prefix: str = "") -> None:
    """Check that a Redis may hold this many bytes of features.

    Args:
        client: The server.
        capacity_bytes: The replay buffer's capacity.
        prefix: The table's own prefix. Tables under other prefixes count against the server's memory.

    Raises:
        ReplayError: It evicts keys, or its `maxmemory` less 15 % is below the capacities that share it.
    """
    memory = client.info("memory")
    policy, limit = str(memory["maxmemory_policy"]), int(memory["maxmemory"])
    if policy != "noeviction" and limit:
        raise ReplayError(
            f"Redis evicts keys when it is full (maxmemory-policy {policy}): samples would vanish. "
            "Set maxmemory-policy noeviction, or use replay.redis=embedded."
        )
    if not limit:
        return
    usable = int(limit * (1 - HEADROOM))
    others = 0
    for key in client.scan_iter(match="*:table", count=1000, _type="HASH"):
        if key.decode() != table_key(prefix):
            others += _capacity(client, key)
    if capacity_bytes + others > usable:
        shared = f", of which other tables have reserved {others}" if others else ""
        raise ReplayError(
            f"replay.capacity is {capacity_bytes} bytes, but Redis may use {usable} for features (maxmemory {limit} "
            f"less {HEADROOM:.0%}{shared}). Lower replay.capacity to {max(usable - others, 0)} or raise maxmemory to "
            f"{int((capacity_bytes + others) / (1 - HEADROOM)) + 1}."
        )


def _capacity(client: redis.Redis, key: bytes) -> int:
    """What another table has reserved; 0 for keys that this user may not see: they are no table of ours."""
    try:
        return int(client.hget(key, "capacity") or 0)
    except ReplayError as error:
        if isinstance(error.__cause__, redis.exceptions.NoPermissionError):
            return 0
        raise


class Claim:
    """A held prefix, renewed in the background; a context manager that ends the claim."""

    def __init__(self, client: redis.Redis, prefix: str, owner: str, ttl_s: float) -> None:
        """Use `claim`."""
        self._scripts = Scripts(client, prefix)
        self._prefix = prefix
        self._owner = owner
        self._ttl_s = ttl_s
        self._closed = threading.Event()
        self._renew()
        self._thread = threading.Thread(target=self._keep, name="claim", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the claim. Again: nothing happens."""
        self._closed.set()
        self._thread.join()
        with contextlib.suppress(ReplayUnavailableError):  # Redis is gone, and the claim with it
            self._scripts.run("unclaim", self._owner)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _keep(self) -> None:
        while not self._closed.wait(self._ttl_s / RENEWALS_A_TTL):
            try:
                self._renew()
            except ReplayError as error:  # the next renewal may succeed
                logger.warning("the claim on the prefix %r was not renewed: %s", self._prefix, error)

    def _renew(self) -> None:
        status, rest = self._scripts.run("claim", self._owner, int(self._ttl_s * 1000))
        if status == "OWNED":
            raise ReplayError(
                f"the prefix {self._prefix!r} in Redis belongs to {rest[0].decode()}, which is alive or died less than "
                f"{self._ttl_s:g} s ago. Wait for it, stop it, or give this run another name."
            )


def claim(client: redis.Redis, prefix: str, owner: str, ttl_s: float = CLAIM_TTL_S) -> Claim:
    """Claim a prefix for as long as this process lives.

    Args:
        client: The Redis of the run.
        prefix: What to claim.
        owner: Names the run, for the error that another one gets. The same owner may claim again at once, so that a
            killed run can be resumed.
        ttl_s: A claim ends by itself this long after its last renewal.

    Raises:
        ReplayError: Another owner's claim is alive.
    """
    return Claim(client, prefix, owner, ttl_s)
