"""Make a new drafter for a target."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PretrainedConfig

from drafters.config import DrafterConfig
from drafters.drafter import Drafter
from drafters.families.family import Family
from drafters.registry import find_algorithm, find_family

SERVABLE: Mapping[str, Any] = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
"""What servers' Llama layers are, whatever the target's: the layout that they read has it."""


def build_drafter(target_config: PretrainedConfig, algorithm: str = "dspark", **settings: Any) -> Drafter:
    """A drafter with new weights, in float32 and training mode; N(0, initializer_range), biases 0, norms 1.

    Embedding and head are random too, until `copy_target_embeddings` brings the target's.

    Args:
        target_config: The target's config; a nested text config is what counts.
        algorithm: Name in the registry.
        **settings: Fields of `DrafterConfig`; layer ids and mask token have defaults by target.

    Raises:
        ValueError: Unknown algorithm or family, unknown or impossible setting.
    """
    text_config = target_config.get_text_config(decoder=True)
    resolved = DrafterConfig(algorithm=algorithm, **settings).resolve(
        num_target_layers=text_config.num_hidden_layers,
        vocab_size=text_config.vocab_size,
        model_type=text_config.model_type,
    )
    drafter_class = find_algorithm(algorithm).load()
    family = find_family("llama" if resolved.layout == "llama" else text_config.model_type)
    drafter = drafter_class(draft_config(text_config, resolved, family), resolved, family)
    drafter.initialize_weights()
    return drafter


def draft_config(text_config: PretrainedConfig, settings: DrafterConfig, family: Family) -> PretrainedConfig:
    """The target's text config with the drafter's layers; what else the drafter is stands in its settings."""
    values = family.draft_values(text_config)
    values.pop("_name_or_path", None)
    if settings.layout == "llama":
        values.update(SERVABLE)
    values.update(
        num_hidden_layers=settings.num_draft_layers,
        layer_types=["full_attention"] * settings.num_draft_layers,
        tie_word_embeddings=False,
        num_target_layers=text_config.num_hidden_layers,
    )
    return family.read_config(values)
