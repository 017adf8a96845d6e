"""Settings of the decoding that measures a drafter."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Placement = Literal["gpu", "share_target", "off"]


class EvaluationConfig(BaseModel):
    """The recipe's `evaluation` section: real speculative decoding of held-out prompts."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    max_samples: int = Field(
        24, ge=0, description="held-out prompts to decode before and after training; 0 switches evaluation off"
    )
    placement: Placement = Field(
        "share_target",
        description="where checkpoints are measured during training: gpu (on GPUs of its own), share_target (beside "
        "the target, on a part of its GPU or, without num_gpus, as one thread of the lowest priority) or off (not at "
        "all). Left out: gpu where num_gpus is 1 or more, else share_target",
    )
    every: int | None = Field(
        None,
        ge=1,
        description="optimizer steps between measured checkpoints; null: each that the evaluator keeps up with",
    )
    during_samples: int | None = Field(
        None, ge=1, description="held-out prompts to decode during training, the first of all; null: all"
    )
    batch_size: int = Field(16, ge=1, description="prompts that are decoded at once; more need more memory")
    max_new_tokens: int = Field(128, ge=1, description="tokens to generate for each prompt")
    temperature: float = Field(0.0, ge=0, description="0 is greedy")
    confidence_threshold: float = Field(0.0, ge=0, le=1, description="cuts a proposal before the first unsure token")
    num_gpus: float = Field(
        0.0, ge=0, description="GPUs of the evaluator; 0 runs on the CPU. Left out: 1 with placement gpu, else 0"
    )
    threads: int | None = Field(
        None, ge=1, description="torch threads of the evaluator; during training on the target's CPUs it has one"
    )
    wait_s: float = Field(
        3600.0, gt=0, description="longest wait for the measurements at the end of a run; after that it fails"
    )
    seed: int = Field(980406, description="seeds sampling at temperatures above 0")

    @model_validator(mode="before")
    @classmethod
    def _placement_and_gpus_follow_each_other(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        num_gpus = given.get("num_gpus", 0)
        has_own = isinstance(num_gpus, int | float) and num_gpus >= 1
        placement = given.get("placement", "gpu" if has_own else "share_target")
        placement = "off" if placement is False else placement  # what YAML makes of a bare off
        return {"num_gpus": 1.0 if placement == "gpu" else 0.0} | given | {"placement": placement}

    @model_validator(mode="after")
    def _gpus_fit_the_placement(self) -> Self:
        if self.placement == "gpu" and (self.num_gpus < 1 or self.num_gpus != int(self.num_gpus)):
            raise ValueError(
                f"placement gpu takes whole GPUs, not {self.num_gpus:g}: leave num_gpus out for one, or set placement "
                "to share_target for a part of the target's"
            )
        if self.placement == "share_target" and self.num_gpus >= 1:
            raise ValueError(
                f"placement share_target takes a part of the target's GPU, not {self.num_gpus:g}: set num_gpus below "
                "1, or placement to gpu"
            )
        return self

    @property
    def dtype(self) -> Literal["float32", "bfloat16"]:
        """Of target and drafter: on a GPU as they are served, on CPUs the one in which equality is exact."""
        return "bfloat16" if self.num_gpus else "float32"

    @property
    def num_during(self) -> int:
        """Prompts that are decoded with a checkpoint during training."""
        return min(self.during_samples or self.max_samples, self.max_samples)

    @property
    def threads_during(self) -> int | None:
        """Torch threads while training goes on: one on CPUs that are the target's, too."""
        return 1 if self.is_low_priority and not self.num_gpus else self.threads

    @property
    def is_low_priority(self) -> bool:
        """Whether measuring during training gives way to everything else on its CPUs."""
        return self.placement == "share_target"
