"""Settings of the replay buffer: where it lives and how many bytes it may hold."""

from __future__ import annotations

from pydantic import BaseModel, ByteSize, ConfigDict, Field, field_serializer

from services.contracts import DEFAULT_CHUNK_BYTES, MAX_CHUNK_BYTES, WireDtype
from services.replay.urls import without_password

EMBEDDED = "embedded"


class ReplayConfig(BaseModel):
    """The recipe's `replay` section."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    redis: str = Field(
        EMBEDDED,
        repr=False,
        description="'embedded', or the URL of your own Redis: redis://, rediss://, unix://; its password may come "
        "from the environment variable SLIPSTREAM_REDIS_PASSWORD",
    )
    capacity: ByteSize = Field(
        ByteSize(4 * 1024**3), gt=0, description="most resident feature bytes, captures in flight included ('4GiB')"
    )
    wire_dtype: WireDtype = Field("bf16", description="dtype of features on the wire and in the buffer")
    chunk: ByteSize = Field(
        ByteSize(DEFAULT_CHUNK_BYTES), gt=0, le=MAX_CHUNK_BYTES, description="most bytes of one chunk"
    )
    pulls: int = Field(8, ge=1, description="captures that a shard pulls at once")
    reuse: int = Field(1, ge=1, description="passes through the drafter that one capture feeds")
    lease_s: float = Field(300.0, gt=0, description="how long a trainer may hold a sample, or a shard a capture")

    @field_serializer("redis")
    def _without_password(self, url: str) -> str:
        """What is written down and shown has no password."""
        return without_password(url)
