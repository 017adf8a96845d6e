"""Settings of the targets: which frozen model, how many servers, on what."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from services.placement import PlacementConfig

ListenWhere = Literal["auto", "loopback", "node"]
"""auto: on the loopback interface on the shard's machine, on the node's address with token and TLS on others."""


class TargetConfig(PlacementConfig):
    """The recipe's `target` section. GPUs, CPUs, resources and labels are those of each server."""

    model: str = Field(description="Hugging Face folder or hub name of the frozen target")
    engine: Literal["transformers"] = Field("transformers", description="what runs the target's forward pass")
    replicas: int = Field(1, ge=1, description="target servers to start; scales independently of the trainer")
    max_replicas: int = Field(64, ge=1, description="most servers that a running job can be scaled to")
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
        return self
