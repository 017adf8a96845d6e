"""Settings of the replay service beside those of its buffer (`services.replay.config`)."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class ServiceConfig(BaseModel):
    """How many may call at once, and how long the service is patient."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_inserts: int = Field(32, ge=1, description="Insert streams at once; more are refused")
    max_leases: int = Field(32, ge=1, description="Lease calls at once, those that wait included; more are refused")
    progress_s: float = Field(
        60.0, gt=0, description="how long a producer may be silent within a sample, or a consumer read nothing"
    )
    idle_s: float = Field(600.0, gt=0, description="how long a producer may be silent between two samples")
    max_wait_s: float = Field(600.0, gt=0, description="longest wait for room, or for samples to lease")
    chunks_url: str | None = Field(
        None,
        repr=False,
        description="Redis URL that consumers shall read chunks from; they are told it without its password. None: "
        "they have the chunks streamed",
    )
