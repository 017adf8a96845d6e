"""Settings of a drafter, as the recipe's `drafter` section and `build_drafter` take them."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class DrafterConfig(BaseModel):
    """The recipe's `drafter` section. Defaults are the reference's (specs: γ 7, 5 layers, r 256, 512 anchors)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    algorithm: Literal["dspark"] = Field("dspark", description="which drafter to train")
    num_draft_layers: int = Field(5, ge=1, description="decoder layers of the drafter")
    block_size: int = Field(7, ge=1, description="γ: tokens drafted at once")
    num_anchors: int = Field(512, ge=1, description="A: most anchors drawn from a sequence")
    target_layer_ids: tuple[int, ...] | None = Field(
        None,
        min_length=1,
        description="captured target layers, ascending, never the last; null spreads five evenly; -1 is the embedding",
    )
    mask_token_id: int | None = Field(None, description="token that stands for an undrafted place; null: the family's")
    markov_rank: int = Field(256, ge=0, description="r: rank of the Markov head; 0 leaves it out")
    markov_head_type: Literal["vanilla", "gated", "rnn"] = Field("vanilla", description="form of the Markov head")
    enable_confidence_head: bool = Field(True, description="train a head that predicts acceptance")
    confidence_head_with_markov: bool = Field(True, description="let the confidence head see the Markov embedding")
    loss_decay_gamma: float = Field(4.0, gt=0, description="slot k weighs exp(-k / this)")
    ce_loss_alpha: float = Field(0.1, ge=0, description="weight of the cross-entropy against the labels")
    l1_loss_alpha: float = Field(0.9, ge=0, description="weight of the L1 distance to the target's distribution")
    confidence_head_alpha: float = Field(1.0, ge=0, description="weight of the confidence loss")
    loss: Literal["fused", "plain"] = Field(
        "fused", description="how the loss is computed: in chunks that need little memory, or all at once, to compare"
    )
    warm_start_layers: tuple[int, ...] | None = Field(
        None,
        min_length=1,
        description="target layers whose weights the draft layers begin with, one each; null begins with random ones",
    )
    permute_context: bool = Field(
        False, description="control for benchmarks: context features lose their place, so only their content can help"
    )

    @model_validator(mode="after")
    def _confidence_head_has_its_inputs(self) -> Self:
        if self.enable_confidence_head and self.confidence_head_with_markov and self.markov_rank == 0:
            raise ValueError(
                "confidence_head_with_markov needs the Markov head, but markov_rank is 0: set "
                "confidence_head_with_markov to false, or markov_rank above 0"
            )
        return self

    def resolve(self, *, num_target_layers: int, vocab_size: int, model_type: str) -> Self:
        """Fill in layer ids and mask token for a target, and check both against it.

        Raises:
            ValueError: A layer id is out of range, unsorted or the last layer, or the mask token is
                none of the target's.
        """
        layer_ids = self.target_layer_ids or spread_layer_ids(num_target_layers)
        mask_token_id = self.mask_token_id if self.mask_token_id is not None else DEFAULT_MASK_TOKENS.get(model_type)
        if list(layer_ids) != sorted(set(layer_ids)):
            raise ValueError(f"drafter.target_layer_ids {list(layer_ids)} must ascend without repeats")
        if layer_ids[0] < -1 or layer_ids[-1] > num_target_layers - 2:
            raise ValueError(
                f"drafter.target_layer_ids {list(layer_ids)} must lie between -1 (the embedding) and "
                f"{num_target_layers - 2}: the target has {num_target_layers} layers, and the last is never captured"
            )
        warm = self.warm_start_layers
        if warm and (len(warm) != self.num_draft_layers or not 0 <= min(warm) <= max(warm) < num_target_layers):
            raise ValueError(
                f"drafter.warm_start_layers {list(warm)} must name one of the target's layers 0 to "
                f"{num_target_layers - 1} for each of the {self.num_draft_layers} draft layers"
            )
        if mask_token_id is None:
            raise ValueError(
                f"drafter.mask_token_id has no default for model type {model_type!r}: "
                "name a token that ordinary text never contains"
            )
        if not 0 <= mask_token_id < vocab_size:
            raise ValueError(
                f"drafter.mask_token_id {mask_token_id} is outside the target's vocabulary of {vocab_size}"
            )
        return self.model_copy(update={"target_layer_ids": tuple(layer_ids), "mask_token_id": mask_token_id})


DEFAULT_MASK_TOKENS = {"qwen3": 151669}
"""Mask token by the target's model type: one that its tokenizer never writes."""


def spread_layer_ids(num_target_layers: int, count: int = 5) -> tuple[int, ...]:
    """Layer ids spread evenly from 1 to num_target_layers − 3, rounded (the DFlash authors' rule)."""
    last = num_target_layers - 3
    ids = tuple(round(1 + i * (last - 1) / (count - 1)) for i in range(count))
    if len(set(ids)) < count:
        raise ValueError(
            f"a target of {num_target_layers} layers is too shallow for {count} captured layers: name them"
        )
    return ids
