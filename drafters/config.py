"""Settings of a drafter, as the recipe's `drafter` section and `build_drafter` take them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

BLOCK_SETTINGS = frozenset(
    (
        "block_size",
        "num_anchors",
        "mask_token_id",
        "sample_from_anchor",
        "warm_start_layers",
        "permute_context",
        "loss_decay_gamma",
        "ce_loss_alpha",
        "l1_loss_alpha",
    )
)
"""Settings of the block-parallel drafters alone."""

HEAD_SETTINGS = frozenset(
    (
        "markov_rank",
        "markov_head_type",
        "enable_confidence_head",
        "confidence_head_with_markov",
        "confidence_head_alpha",
    )
)
"""Settings of DSpark alone."""

EAGLE3_SETTINGS = frozenset(("ttt_length", "step_loss_decay", "layout", "draft_vocab_size"))
"""Settings of Eagle3 alone."""

FOREIGN_SETTINGS: Mapping[str, frozenset[str]] = {
    "dspark": EAGLE3_SETTINGS,
    "dflash": EAGLE3_SETTINGS | HEAD_SETTINGS,
    "eagle3": BLOCK_SETTINGS | HEAD_SETTINGS,
}
"""Settings that an algorithm does not have."""

NO_HEADS: Mapping[str, Any] = {
    "markov_rank": 0,
    "enable_confidence_head": False,
    "confidence_head_alpha": 0.0,
}

ALGORITHM_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "dspark": {},
    "dflash": {**NO_HEADS, "ce_loss_alpha": 1.0, "l1_loss_alpha": 0.0},
    "eagle3": {**NO_HEADS, "num_draft_layers": 1},
}
"""Where an algorithm's defaults are not DSpark's."""


class DrafterConfig(BaseModel):
    """The recipe's `drafter` section.

    Defaults are the reference's (specs: γ 7, 5 layers, r 256, 512 anchors): DSpark's here, for the others with
    `ALGORITHM_DEFAULTS`. A setting that an algorithm does not have can only be left at its default.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    algorithm: Literal["dspark", "dflash", "eagle3"] = Field("dspark", description="which drafter to train")
    num_draft_layers: int = Field(5, ge=1, description="decoder layers of the drafter")
    block_size: int = Field(7, ge=1, description="γ: tokens drafted at once")
    num_anchors: int = Field(512, ge=1, description="A: most anchors drawn from a sequence")
    target_layer_ids: tuple[int, ...] | None = Field(
        None,
        min_length=1,
        description="captured target layers, ascending, never the last; null takes the target's; -1 is the embedding",
    )
    mask_token_id: int | None = Field(None, description="token that stands for an undrafted place; null: the family's")
    sample_from_anchor: bool = Field(
        True, description="slot 0 predicts from the anchor: γ drafts of γ inputs; false: masks alone predict, γ − 1"
    )
    markov_rank: int = Field(256, ge=0, description="r: rank of the Markov head; 0 leaves it out")
    markov_head_type: Literal["vanilla", "gated", "rnn"] = Field("vanilla", description="form of the Markov head")
    enable_confidence_head: bool = Field(True, description="train a head that predicts acceptance")
    confidence_head_with_markov: bool = Field(True, description="let the confidence head see the Markov embedding")
    loss_decay_gamma: float = Field(4.0, gt=0, description="slot k weighs exp(-k / this)")
    ce_loss_alpha: float = Field(0.1, ge=0, description="weight of the cross-entropy against the labels")
    l1_loss_alpha: float = Field(0.9, ge=0, description="weight of the L1 distance to the target's distribution")
    confidence_head_alpha: float = Field(1.0, ge=0, description="weight of the confidence loss")
    ttt_length: int = Field(7, ge=1, description="Eagle3: steps of the training-time test, and tokens of a proposal")
    step_loss_decay: float = Field(0.8, gt=0, description="Eagle3: step i weighs this to the power of i")
    layout: Literal["reference", "llama"] = Field(
        "reference", description="Eagle3: five layers and head norms, or three and none, as servers want it"
    )
    draft_vocab_size: int | None = Field(
        None,
        ge=2,
        description="Eagle3: tokens it can draft, the most frequent of the answers it learns; null: the target's all",
    )
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

    @model_validator(mode="before")
    @classmethod
    def _algorithm_has_its_defaults(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        algorithm = values.get("algorithm", "dspark")
        return dict(ALGORITHM_DEFAULTS.get(algorithm, {}) if isinstance(algorithm, str) else {}) | dict(values)

    @model_validator(mode="after")
    def _settings_are_the_algorithms(self) -> Self:
        unused = self._unused_values()
        wrong = sorted(name for name, value in unused.items() if getattr(self, name) != value)
        if wrong:
            raise ValueError(
                f"{', '.join(wrong)}: no setting of {self.algorithm}; leave it out, or choose another algorithm"
            )
        return self

    @model_validator(mode="after")
    def _something_is_drafted(self) -> Self:
        if self.block_size == 1 and not self.sample_from_anchor:
            raise ValueError(
                "block_size 1 with sample_from_anchor false drafts nothing: slot 0 is not predicted. Set block_size to "
                "at least 2, or sample_from_anchor to true"
            )
        return self

    @model_validator(mode="after")
    def _confidence_head_has_its_inputs(self) -> Self:
        if self.enable_confidence_head and self.confidence_head_with_markov and self.markov_rank == 0:
            raise ValueError(
                "confidence_head_with_markov needs the Markov head, but markov_rank is 0: set "
                "confidence_head_with_markov to false, or markov_rank above 0"
            )
        return self

    @property
    def num_drafts(self) -> int:
        """Tokens of a whole proposal."""
        if self.algorithm == "eagle3":
            return self.ttt_length
        return self.block_size if self.sample_from_anchor else self.block_size - 1

    def resolve(self, *, num_target_layers: int, vocab_size: int, model_type: str) -> Self:
        """Fill in layer ids and mask token for a target, and check both against it.

        Args:
            num_target_layers: Decoder layers of the target.
            vocab_size: V.
            model_type: Of the target's text config.

        Raises:
            ValueError: A layer id is out of range, unsorted or the last layer, there are too many or too few for the
                layout, the mask token is none of the target's, or it has fewer tokens than are to be drafted.
        """
        layer_ids = self.target_layer_ids or default_layer_ids(num_target_layers, model_type, self._num_layer_ids or 5)
        self._check_layer_ids(layer_ids, num_target_layers)
        self._check_warm_start(num_target_layers)
        mask_token_id = self.mask_token_id
        if self.algorithm != "eagle3":
            mask_token_id = self._resolve_mask_token(vocab_size, model_type)
        return self.model_copy(
            update={
                "target_layer_ids": tuple(layer_ids),
                "mask_token_id": mask_token_id,
                "draft_vocab_size": self._resolve_draft_vocab_size(vocab_size),
            }
        )

    @property
    def _num_layer_ids(self) -> int | None:
        """Captured layers that the layout asks for; None for any number."""
        if self.algorithm != "eagle3":
            return None
        return 5 if self.layout == "reference" else 3

    def _unused_values(self) -> dict[str, Any]:
        """Settings that the algorithm does not have, with the one value each can have."""
        defaults = ALGORITHM_DEFAULTS[self.algorithm]
        fields = type(self).model_fields
        return {name: defaults.get(name, fields[name].default) for name in FOREIGN_SETTINGS[self.algorithm]}

    def _check_layer_ids(self, layer_ids: tuple[int, ...], num_target_layers: int) -> None:
        first, last = 0 if self.algorithm == "eagle3" else -1, num_target_layers - 2
        lowest = "0" if first == 0 else "-1 (the embedding)"
        if list(layer_ids) != sorted(set(layer_ids)):
            raise ValueError(f"drafter.target_layer_ids {list(layer_ids)} must ascend without repeats")
        if layer_ids[0] < first or layer_ids[-1] > last:
            raise ValueError(
                f"drafter.target_layer_ids {list(layer_ids)} must lie between {lowest} and {last}: the target has "
                f"{num_target_layers} layers, and the last is never captured"
            )
        if self._num_layer_ids not in (None, len(layer_ids)):
            raise ValueError(
                f"drafter.target_layer_ids {list(layer_ids)} must be {self._num_layer_ids} layers for Eagle3's layout "
                f"{self.layout!r}, not {len(layer_ids)}"
            )

    def _check_warm_start(self, num_target_layers: int) -> None:
        warm = self.warm_start_layers
        if warm and (len(warm) != self.num_draft_layers or not 0 <= min(warm) <= max(warm) < num_target_layers):
            raise ValueError(
                f"drafter.warm_start_layers {list(warm)} must name one of the target's layers 0 to "
                f"{num_target_layers - 1} for each of the {self.num_draft_layers} draft layers"
            )

    def _resolve_draft_vocab_size(self, vocab_size: int) -> int | None:
        """None where nothing is cut."""
        if self.draft_vocab_size is not None and self.draft_vocab_size > vocab_size:
            raise ValueError(
                f"drafter.draft_vocab_size {self.draft_vocab_size} is above the target's vocabulary of {vocab_size}: "
                "lower it, or leave it out to draft every token"
            )
        return None if self.draft_vocab_size == vocab_size else self.draft_vocab_size

    def _resolve_mask_token(self, vocab_size: int, model_type: str) -> int:
        mask_token_id = self.mask_token_id if self.mask_token_id is not None else DEFAULT_MASK_TOKENS.get(model_type)
        if mask_token_id is None:
            raise ValueError(
                f"drafter.mask_token_id has no default for model type {model_type!r}: "
                "name a token that ordinary text never contains"
            )
        if not 0 <= mask_token_id < vocab_size:
            raise ValueError(
                f"drafter.mask_token_id {mask_token_id} is outside the target's vocabulary of {vocab_size}"
            )
        return mask_token_id


DEFAULT_MASK_TOKENS = {"qwen3": 151669, "qwen3_moe": 151669, "gemma4_text": 4, "gemma4_unified_text": 4}
"""Mask token by the target's model type: one that its tokenizer never writes."""

RELEASED_LAYER_IDS = {
    ("gemma4_text", 48): (5, 17, 29, 41, 46),
    ("gemma4_unified_text", 48): (5, 17, 29, 41, 46),
}
"""Five layers of a model type and depth, where released drafters do not follow the spread rule: Gemma-4-12B."""


def settings_of(algorithm: str, section: Mapping[str, Any]) -> dict[str, Any]:
    """What of a `drafter` section that was written for one algorithm another one has, too.

    Args:
        algorithm: The other one.
        section: Settings by name.
    """
    foreign = FOREIGN_SETTINGS.get(algorithm, frozenset())
    return {name: value for name, value in section.items() if name not in foreign} | {"algorithm": algorithm}


def default_layer_ids(num_target_layers: int, model_type: str, count: int = 5) -> tuple[int, ...]:
    """Layer ids for a target whose recipe names none: the released ones, or else evenly spread ones."""
    released = RELEASED_LAYER_IDS.get((model_type, num_target_layers))
    if released is not None and len(released) == count:
        return released
    return spread_layer_ids(num_target_layers, count)


def spread_layer_ids(num_target_layers: int, count: int = 5) -> tuple[int, ...]:
    """Layer ids spread evenly from 1 to num_target_layers − 3, rounded (the DFlash authors' rule)."""
    last = num_target_layers - 3
    ids = tuple(round(1 + i * (last - 1) / (count - 1)) for i in range(count))
    if len(set(ids)) < count:
        raise ValueError(
            f"a target of {num_target_layers} layers is too shallow for {count} captured layers: name them"
        )
    return ids
