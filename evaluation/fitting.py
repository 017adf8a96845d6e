"""Whether a drafter and prompts fit a target, asked before anything is decoded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from drafters.drafter import Drafter
from drafters.registry import find_family


def check_fits(drafter: Drafter, target: nn.Module, name: str) -> None:
    """Check that a drafter was made for such a target, as far as their configs tell.

    Args:
        drafter: Any.
        target: A transformers causal LM.
        name: Of the drafter, for the message.

    Raises:
        ValueError: Family, vocabulary, width or layers are another target's.
    """
    config = text_config(target)
    if find_family(drafter.target_model_type) is not find_family(config.model_type):
        raise ValueError(
            f"{name} was made for a {drafter.target_model_type} target, this one is a {config.model_type}: drafters "
            "serve the family that they were trained with"
        )
    for field in ("vocab_size", "hidden_size"):
        ours, targets = getattr(drafter.config, field), getattr(config, field)
        if ours != targets:
            raise ValueError(f"{name} has {field} {ours}, the target has {targets}: it was made for another target")
    layer_ids = drafter.settings.target_layer_ids or ()
    if max(layer_ids) > config.num_hidden_layers - 1:
        raise ValueError(
            f"{name} reads target layers {list(layer_ids)}, the target has {config.num_hidden_layers} layers: it was "
            "made for another target"
        )


def check_depth(drafter: Drafter, target: nn.Module, name: str) -> None:
    """Check that a drafter's checkpoint states as many target layers as there are.

    Raises:
        ValueError: It states others.
    """
    ours, targets = drafter.config.num_target_layers, text_config(target).num_hidden_layers
    if ours != targets:
        raise ValueError(f"{name} was made for a target of {ours} layers, this one has {targets}: it is another target")


def check_prompts(prompts: Sequence[Sequence[int]], target: nn.Module) -> None:
    """Check that a target can read prompts.

    Raises:
        ValueError: One is empty, or longer than the target's context.
    """
    longest = context_tokens(target)
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {index} is empty: decoding needs at least one token")
        if longest is not None and len(prompt) > longest:
            raise ValueError(
                f"prompt {index} has {len(prompt)} tokens, more than the target's context of {longest}: shorten it or "
                "leave it out"
            )


def context_tokens(target: nn.Module) -> int | None:
    """The most tokens that a target was made for; None where its config does not say."""
    longest: int | None = getattr(text_config(target), "max_position_embeddings", None)
    return longest


def text_config(target: Any) -> Any:
    """The config of a causal LM's text part."""
    return target.config.get_text_config()
