"""Settings of the decoding that measures a drafter."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class EvaluationConfig(BaseModel):
    """The recipe's `evaluation` section: real speculative decoding of held-out prompts."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    max_samples: int = Field(24, ge=0, description="held-out prompts to decode; 0 switches evaluation off")
    batch_size: int = Field(16, ge=1, description="prompts that are decoded at once; more need more memory")
    max_new_tokens: int = Field(128, ge=1, description="tokens to generate for each prompt")
    temperature: float = Field(0.0, ge=0, description="0 is greedy")
    confidence_threshold: float = Field(0.0, ge=0, le=1, description="cuts a proposal before the first unsure token")
    num_gpus: float = Field(0.0, ge=0, description="GPUs of the evaluator; 0 runs on the CPU")
    threads: int | None = Field(None, ge=1, description="torch threads of the evaluator")
    seed: int = Field(980406, description="seeds sampling at temperatures above 0")
