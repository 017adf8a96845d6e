"""Settings of the replay buffer: where it lives, how many bytes it may hold, and who waits for whom."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ByteSize, ConfigDict, Field, field_serializer, model_validator

from services.contracts import DEFAULT_CHUNK_BYTES, MAX_CHUNK_BYTES, WireDtype
from services.replay.rate_limiter import RateLimiter
from services.replay.selectors import Selector, SelectorKind
from services.replay.urls import split_urls, without_password

EMBEDDED = "embedded"

Tier = Literal["redis", "shm", "auto"]

MAX_SHARDS = 64

MAX_CAPACITY_BYTES = 2**53
"""What Lua's numbers count exactly: 8 PiB."""


def _check_length(size: Any) -> Any:
    if isinstance(size, str) and len(size) > 32:
        raise ValueError("longer than a number of bytes with its unit")
    return size


def _join_urls(redis: Any) -> Any:
    if isinstance(redis, list | tuple) and redis and all(isinstance(url, str) for url in redis):
        return ",".join(redis)
    return redis


Urls = Annotated[str, BeforeValidator(_join_urls)]
"""One URL, or several with commas between; also as a list."""

Bytes = Annotated[ByteSize, BeforeValidator(_check_length)]
"""A number of bytes, also as text with a unit. Longer texts become numbers that no integer can be made of."""


class ReplayConfig(BaseModel):
    """The recipe's `replay` section."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    redis: Urls = Field(
        EMBEDDED,
        repr=False,
        description="'embedded', or the URL of your own Redis: redis://, rediss://, unix://; its password may come "
        "from the environment variable SLIPSTREAM_REDIS_PASSWORD. With shards, a list of so many URLs",
    )
    shards: int = Field(
        1,
        ge=1,
        le=MAX_SHARDS,
        description="replay shards: so many Redis servers, each with a process that fills it, share the captures",
    )
    capacity: Bytes = Field(
        ByteSize(4 * 1024**3),
        gt=0,
        le=MAX_CAPACITY_BYTES,
        description="most resident feature bytes, captures in flight included ('4GiB'); each shard has an equal part",
    )
    wire_dtype: WireDtype = Field(
        "bf16",
        description="dtype of features on the wire and in the buffer: bf16, fp16, fp32, or fp8_e4m3 with a scale a row "
        "and layer, which halves bf16's bytes; ranks compute in their own dtype all the same",
    )
    tier: Tier = Field(
        "redis",
        description="where features lie: redis, shm (shared memory: shards and ranks are on the driver's host), auto "
        "(shm if that is so and there is room)",
    )
    chunk: Bytes = Field(ByteSize(DEFAULT_CHUNK_BYTES), gt=0, le=MAX_CHUNK_BYTES, description="most bytes of one chunk")
    pulls: int = Field(8, ge=1, description="captures that a shard pulls at once")
    reuse: int = Field(1, ge=1, description="passes through the drafter that one capture feeds")
    lease_s: float = Field(300.0, gt=0, description="how long a trainer may hold a sample, or a shard a capture")
    first_chunk_s: float | None = Field(
        None, gt=0, description="how long a target may take to send a capture's first chunk; null: a third of lease_s"
    )
    progress_s: float | None = Field(
        None, gt=0, description="how long a target may take from one chunk to the next; null: a tenth of lease_s"
    )
    min_size: int = Field(
        1,
        ge=1,
        description="samples that must be in the buffer before the trainer gets any: what uniform and prioritized "
        "draw from. It never holds up a full buffer or the end of the plan",
    )
    samples_per_insert: int | None = Field(
        None,
        ge=1,
        description="with error_buffer: uses that a capture is expected to feed; null is replay.reuse. Less lets the "
        "buffer fill up before samples are used again",
    )
    error_buffer: int | None = Field(
        None,
        ge=1,
        description="uses by which capturing may run ahead of training, or training ahead of capturing; null leaves "
        "that to replay.capacity",
    )
    selector: SelectorKind = Field(
        SelectorKind.FIFO,
        description="which sample comes next: fifo (oldest first), uniform (any), prioritized (rather one whose drafts "
        "were rejected)",
    )
    priority_exponent: float = Field(
        0.6, ge=0, le=2, description="prioritized: rejection to this power is a sample's share; 0 is uniform"
    )
    importance_exponent: float = Field(
        0.4,
        ge=0,
        le=1,
        description="prioritized: how far the loss undoes the uneven draws; 1 wholly, 0 not at all",
    )

    @property
    def urls(self) -> tuple[str, ...]:
        """The user's own servers, one a shard; none where they are embedded."""
        return () if self.redis == EMBEDDED else split_urls(self.redis)

    @property
    def shard_capacity(self) -> int:
        """Bytes that each shard may hold: the same for all, so up to `shards` − 1 bytes belong to none."""
        return int(self.capacity) // self.shards

    def of_one_shard(self) -> Self:
        """What one shard makes of these settings; `min_size`, the other limits and `pulls` hold for each of them."""
        return self.model_copy(update={"capacity": ByteSize(self.shard_capacity), "shards": 1})

    @property
    def patience_s(self) -> tuple[float, float]:
        """Longest wait for a capture's first chunk, and for each one after it."""
        return self.first_chunk_s or self.lease_s / 3, self.progress_s or self.lease_s / 10

    @property
    def rate_limiter(self) -> RateLimiter:
        """The limits that these settings make."""
        return RateLimiter.with_error_buffer(self.min_size, self.samples_per_insert or self.reuse, self.error_buffer)

    @property
    def is_prioritized(self) -> bool:
        """Whether samples are drawn by how the drafter does on them."""
        return self.selector is SelectorKind.PRIORITIZED

    @property
    def sampling(self) -> Selector:
        """How the table chooses samples."""
        return Selector(self.selector, self.priority_exponent, self.importance_exponent)

    @model_validator(mode="after")
    def _one_server_a_shard(self) -> Self:
        urls = self.urls
        if urls and len(urls) != self.shards:
            raise ValueError(
                f"replay.redis names {len(urls)} servers and replay.shards is {self.shards}: every shard has a Redis "
                f"of its own. Set replay.shards to {len(urls)}, or list {self.shards} URLs"
            )
        if len(set(urls)) < len(urls):
            raise ValueError("replay.redis names a server twice: every shard has a Redis of its own. List others")
        return self

    @model_validator(mode="after")
    def _limits_do_something(self) -> Self:
        if self.samples_per_insert is not None and self.error_buffer is None:
            raise ValueError(
                f"samples_per_insert {self.samples_per_insert} does nothing without error_buffer, which says how far "
                "capturing and training may be apart: set replay.error_buffer, or leave samples_per_insert out"
            )
        if self.samples_per_insert is not None and self.samples_per_insert > self.reuse:
            raise ValueError(
                f"samples_per_insert {self.samples_per_insert} is more than reuse {self.reuse}, which is all the uses "
                "that a capture feeds: lower it, or raise replay.reuse"
            )
        if self.is_prioritized and self.reuse == 1:
            raise ValueError(
                "selector prioritized needs reuse of 2 or more: with reuse 1 a sample is freed after its first use, "
                "and its priority would never be read. Raise replay.reuse, or set replay.selector to uniform"
            )
        self.rate_limiter  # refuses limits that would come to a stand  # noqa: B018
        return self

    @model_validator(mode="after")
    def _loses_patience_before_its_lease(self) -> Self:
        for name, value_s in zip(("first_chunk_s", "progress_s"), self.patience_s, strict=True):
            if value_s >= self.lease_s:
                raise ValueError(
                    f"{name} {value_s:g} must be below lease_s {self.lease_s:g}: a target that hangs must be found out "
                    "before its captures are given to another"
                )
        return self

    @field_serializer("redis")
    def _without_password(self, redis: str) -> str:
        """What is written down and shown has no password."""
        return ",".join(map(without_password, split_urls(redis)))
