"""vLLM's speculators format (specs: checkpoints, "vLLM").

Its layer ids count hidden states, of which the embedding's output is the first: ours + 1. Readers disagree on what an
absent key means, so every key is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from drafters.checkpoint import CONFIG_NAME, WEIGHTS_NAME, CheckpointFormatError, read_tensors, read_values
from drafters.drafter import Drafter
from drafters.eagle3 import Eagle3Drafter
from drafters.export.formats import (
    TABLES,
    ServedTarget,
    Tables,
    Written,
    check_any_server,
    check_block_family,
    check_one_layer,
    layer_values,
    rebuild,
    refuse,
    take_vocabulary,
    vocabulary_tensors,
)

SERVER = "vLLM"
VERSION = "0.9.0"
"""Of the speculators library whose format this is."""

EMBEDDING = "embed_tokens.weight"

LAYER_ID_OFFSET = 1
"""Their layer ids count hidden states, ours count the layers' outputs."""

ARCHITECTURES = {"eagle3": "Eagle3Speculator", "dflash": "DFlashSpeculator", "dspark": "DSparkSpeculator"}
EAGLE3_FAMILIES = ("qwen3", "llama")
EAGLE3_FLAGS = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output", "embed_requires_grad")
"""Variants of Eagle3 that ours is none of; readers' defaults for them differ."""

ANCHOR_WARNING = (
    "DFlash that predicts from the anchor: sample_from_anchor is written as trained, but readers of DFlash disagree on "
    "it, and one that takes it for false accepts next to nothing. Measure the acceptance of your vLLM, or train with "
    "drafter.sample_from_anchor: false"
)
SOFTCAP_WARNING = (
    "vLLM drafts without the target's soft-cap of logits: greedy drafts are the same, sampled ones are drawn from a "
    "sharper distribution. What is decoded stays the target's own"
)


def to_speculators(drafter: Drafter, target: ServedTarget) -> Written:
    """A drafter as vLLM reads it.

    Args:
        drafter: Which.
        target: Named in the config, because servers load it from there.

    Raises:
        CannotExportError: None of its classes computes what this drafter does; the message says which recipe line to
            change.
    """
    check_any_server(drafter, SERVER)
    settings, algorithm = drafter.settings, drafter.algorithm
    config = {
        "architectures": [ARCHITECTURES[algorithm]],
        "speculators_model_type": algorithm,
        "speculators_version": VERSION,
        "speculators_config": {
            "algorithm": algorithm,
            "default_proposal_method": "greedy",
            "proposal_methods": [
                {
                    "proposal_type": "greedy",
                    "speculative_tokens": settings.num_drafts,
                    "verifier_accept_k": 1,
                    "accept_tolerance": 0.0,
                }
            ],
            "verifier": {"name_or_path": target.name, "architectures": list(target.architectures)},
        },
        "transformer_layer_config": layer_values(drafter.config),
        "num_target_layers": drafter.config.num_target_layers,
        "dtype": str(drafter.lm_head.weight.dtype).removeprefix("torch."),
    }
    if isinstance(drafter, Eagle3Drafter):
        return _eagle3(drafter, config)
    return _block(drafter, config)


def load_speculators(folder: Path | str, tables: Tables, dtype: torch.dtype = torch.float32) -> Drafter:
    """Read a drafter in the speculators format; on the CPU and in evaluation mode.

    Args:
        folder: Holds ``config.json`` and ``model.safetensors``.
        tables: The target's embedding and head.
        dtype: What to compute in.

    Raises:
        CheckpointFormatError: A file is missing, broken or of another format, or the two contradict each other.
    """
    folder = Path(folder)
    values, tensors = read_values(folder / CONFIG_NAME), read_tensors(folder / WEIGHTS_NAME)
    algorithm = values.get("speculators_model_type")
    if algorithm not in ARCHITECTURES:
        raise CheckpointFormatError(
            f"{folder / CONFIG_NAME}: speculators_model_type {algorithm!r} is none of {', '.join(ARCHITECTURES)}"
        )
    try:
        layers = values["transformer_layer_config"]
        offsets = take_vocabulary(folder / WEIGHTS_NAME, tensors, tables.lm_head)
        tensors.setdefault(EMBEDDING, tables.embed_tokens)
        if offsets is not None:
            tensors["d2t"] = offsets
        read = _read_eagle3 if algorithm == "eagle3" else _read_block
        settings = read(values, layers) | {"algorithm": algorithm, "num_draft_layers": layers["num_hidden_layers"]}
        num_target_layers = values["num_target_layers"]
    except (KeyError, TypeError, IndexError) as error:
        raise CheckpointFormatError(f"{folder / CONFIG_NAME} is no {algorithm} speculator's: {error!r}") from error
    return rebuild(folder / WEIGHTS_NAME, layers, settings, num_target_layers, tensors, dtype)


def _eagle3(drafter: Eagle3Drafter, config: dict[str, Any]) -> Written:
    if drafter.family.name not in EAGLE3_FAMILIES:
        raise refuse(
            SERVER,
            f"its Eagle3 classes have Qwen3's or Llama's layer, and this one is {drafter.family.name}'s",
            "drafter.layout: llama",
        )
    check_one_layer(drafter, SERVER)
    vocabulary = vocabulary_tensors(drafter)
    config |= {
        "draft_vocab_size": len(vocabulary["d2t"]),
        "eagle_aux_hidden_state_layer_ids": _shifted(drafter),
        **dict.fromkeys(EAGLE3_FLAGS, False),
    }
    if drafter.drafted_tokens is None:
        vocabulary = {"lm_head.weight": vocabulary["lm_head.weight"]}
    warnings = (SOFTCAP_WARNING,) if drafter.logit_softcap else ()
    # The library takes an embedding that is not in the file for read unless its memory happens to hold a NaN.
    embedding = {EMBEDDING: drafter.embed_tokens.weight}
    return Written(config, _layers(drafter) | embedding | vocabulary, warnings)


def _block(drafter: Drafter, config: dict[str, Any]) -> Written:
    settings = drafter.settings
    check_block_family(drafter, SERVER)
    config |= {
        "draft_vocab_size": drafter.config.vocab_size,
        "block_size": settings.block_size,
        "mask_token_id": settings.mask_token_id,
        "aux_hidden_state_layer_ids": _shifted(drafter),
        "sample_from_anchor": settings.sample_from_anchor,
        "sliding_window_non_causal": False,
    }
    warnings: tuple[str, ...] = ()
    if drafter.algorithm == "dspark":
        config |= _dspark_heads(drafter)
    elif settings.sample_from_anchor:
        warnings = (ANCHOR_WARNING,)
    return Written(config, _layers(drafter) | {"lm_head.weight": drafter.lm_head.weight}, warnings)


def _dspark_heads(drafter: Drafter) -> dict[str, Any]:
    settings = drafter.settings
    if not settings.markov_rank:
        raise refuse(SERVER, "its DSpark class always has a Markov head", "drafter.markov_rank: 256")
    if settings.markov_head_type != "vanilla":
        raise refuse(
            SERVER,
            f"its DSpark class reads markov_w1 and markov_w2 only and would pass over the tensors of a "
            f"{settings.markov_head_type} head, so other tokens would be drafted",
            "drafter.markov_head_type: vanilla",
        )
    return {
        "markov_rank": settings.markov_rank,
        "markov_head_type": settings.markov_head_type,
        "enable_confidence_head": settings.enable_confidence_head,
        "confidence_head_with_markov": settings.enable_confidence_head and settings.confidence_head_with_markov,
    }


def _shifted(drafter: Drafter) -> list[int]:
    assert drafter.settings.target_layer_ids is not None, "settings are resolved"
    return [layer_id + LAYER_ID_OFFSET for layer_id in drafter.settings.target_layer_ids]


def _layers(drafter: Drafter) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in drafter.state_dict().items() if name not in (*TABLES, "d2t")}


def _read_eagle3(values: Mapping[str, Any], layers: Mapping[str, Any]) -> dict[str, Any]:
    switched_on = [name for name in EAGLE3_FLAGS if values[name]]
    if switched_on:
        raise CheckpointFormatError(f"Eagle3 with {', '.join(switched_on)} is another drafter than is known here")
    layer_ids = [layer_id - LAYER_ID_OFFSET for layer_id in values["eagle_aux_hidden_state_layer_ids"]]
    return {
        "layout": "llama" if layers["model_type"] == "llama" and len(layer_ids) == 3 else "reference",
        "target_layer_ids": layer_ids,
        "ttt_length": values["speculators_config"]["proposal_methods"][0]["speculative_tokens"],
        "draft_vocab_size": values["draft_vocab_size"],
    }


def _read_block(values: Mapping[str, Any], layers: Mapping[str, Any]) -> dict[str, Any]:
    heads = ("markov_rank", "markov_head_type", "enable_confidence_head", "confidence_head_with_markov")
    return {
        "block_size": values["block_size"],
        "mask_token_id": values["mask_token_id"],
        "target_layer_ids": [layer_id - LAYER_ID_OFFSET for layer_id in values["aux_hidden_state_layer_ids"]],
        "sample_from_anchor": values["sample_from_anchor"],
        **({name: values[name] for name in heads} if values["speculators_model_type"] == "dspark" else {}),
    }
