"""Settings of the prompt source: which conversations, how they are cut, in which order they are used."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class PromptsConfig(BaseModel):
    """The recipe's `prompts` section."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    source: str = Field(
        description="JSONL file of conversations, or 'stdlib' for functions of this Python's standard library"
    )
    heldout: str | None = Field(None, description="JSONL file or 'stdlib': prompts that evaluation decodes")
    epochs: int = Field(1, ge=1, description="passes over all prompts")
    answers: Literal["dataset", "target"] = Field(
        "dataset",
        description="whose answers are trained on: those of the conversations, or the target's own to their prompts",
    )
    max_new_tokens: int = Field(1024, ge=1, description="longest answer of the target's own")
    temperature: float = Field(0.0, ge=0, description="of the target's own answers; 0 is greedy")
    max_length: int = Field(4096, ge=2, description="longest conversation in tokens; longer ones are skipped, counted")
    min_loss_tokens: int = Field(14, ge=1, description="conversations with fewer loss tokens are skipped and counted")
    system_prompt: str | None = Field(
        "You are a helpful assistant.", description="added to training conversations that have none; null adds none"
    )
    enable_thinking: bool = Field(False, description="chat-template mode; a drafter serves the mode it was trained in")
    strict: bool = Field(False, description="end the run at a malformed line; otherwise it is skipped and counted")
    seed: int = Field(42, description="seeds the order of prompts and the anchors")
