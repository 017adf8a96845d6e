"""Settings of the targets: which frozen model, how many servers, on what."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from services.placement import PlacementConfig

ListenWhere = Literal["auto", "loopback", "node"]
"""auto: on the loopback interface on the shard's machine, on the node's address with token and TLS on others."""


class AutoscaleConfig(BaseModel):
    """The recipe's `target.autoscale` section; services/target/autoscaler.py has the law."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    min: int = Field(1, ge=1, description="fewest targets that the autoscaler leaves")
    max: int = Field(ge=1, description="most targets that the autoscaler asks for")
    window_s: float = Field(30.0, gt=0, description="trainer wait and buffer are judged over so many last seconds")
    wait_high: float = Field(
        0.1, gt=0, lt=1, description="a trainer that waits for more than this part of its time gets more targets"
    )
    wait_low: float = Field(
        0.02, ge=0, lt=1, description="targets are given up only while the trainer waits no more than this"
    )
    fill_low: float = Field(
        0.3,
        gt=0,
        le=1,
        description="more targets only help while at most this part of replay.capacity holds samples for the trainer",
    )
    up_cooldown_s: float = Field(60.0, ge=0, description="least time from one change to asking for more targets")
    down_cooldown_s: float = Field(
        300.0, ge=0, description="how long targets must be held back without a break before one is given up"
    )

    @model_validator(mode="after")
    def _has_room_between_its_bounds(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"min {self.min} is above max {self.max}; lower the one or raise the other")
        if self.wait_low >= self.wait_high:
            raise ValueError(
                f"wait_low {self.wait_low:g} must be below wait_high {self.wait_high:g}: without room between them "
                "targets would come and go without end"
            )
        return self


class TargetConfig(PlacementConfig):
    """The recipe's `target` section. GPUs, CPUs, resources and labels are those of each server."""

    model: str = Field(description="Hugging Face folder or hub name of the frozen target")
    engine: Literal["transformers"] = Field("transformers", description="what runs the target's forward pass")
    replicas: int = Field(1, ge=1, description="target servers to start; scales independently of the trainer")
    max_replicas: int = Field(64, ge=1, description="most servers that a running job can be scaled to")
    autoscale: AutoscaleConfig | None = Field(
        None, description="scale the targets by what the trainer waits, between bounds; null leaves it to you"
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field("bfloat16", description="compute dtype of the target")
    threads: int | None = Field(None, ge=1, description="torch threads of each server; None leaves torch's choice")
    max_batch_tokens: int = Field(16384, ge=1, description="token budget of one forward pass, padding included")
    max_batch_samples: int = Field(64, ge=1, description="most samples of one forward pass")
    batch_wait_ms: float = Field(2.0, ge=0, description="how long a forward waits for more requests to join it")
    max_concurrent_captures: int = Field(64, ge=1, description="Capture calls served at once; more are refused")

    listen: ListenWhere = Field(
        "auto",
        description="'loopback' serves the replay shard's machine alone, 'node' listens on the node's address; 'auto' "
        "is loopback beside the shard and node elsewhere",
    )
    insecure: bool = Field(False, description="no TLS beyond the loopback interface; for networks you trust")

    @model_validator(mode="after")
    def _starts_within_its_bound(self) -> Self:
        if self.replicas > self.max_replicas:
            raise ValueError(f"replicas {self.replicas} is above max_replicas {self.max_replicas}; raise the bound")
        if self.autoscale is None:
            return self
        low, high = self.autoscale.min, self.autoscale.max
        if high > self.max_replicas:
            raise ValueError(f"autoscale.max {high} is above max_replicas {self.max_replicas}; raise max_replicas")
        if not low <= self.replicas <= high:
            raise ValueError(
                f"replicas {self.replicas}, with which the run starts, must lie between autoscale.min {low} and "
                f"autoscale.max {high}; change one of them"
            )
        return self
