"""What serving formats have in common: a config, tensors, and the target's tables that they leave out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PretrainedConfig

from drafters.checkpoint import CONFIG_NAME, WEIGHTS_NAME, CheckpointFormatError, check_tensors
from drafters.config import DrafterConfig
from drafters.drafter import Drafter
from drafters.eagle3 import Eagle3Drafter
from drafters.registry import find_algorithm, find_family
from drafters.vocabulary import check_offsets

LAYER_VALUES = (
    "attention_bias",
    "attention_dropout",
    "bos_token_id",
    "eos_token_id",
    "final_logit_softcapping",
    "head_dim",
    "hidden_act",
    "hidden_size",
    "initializer_range",
    "intermediate_size",
    "layer_types",
    "max_position_embeddings",
    "mlp_bias",
    "model_type",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "pad_token_id",
    "rms_norm_eps",
    "vocab_size",
)
"""What of a draft model's config makes its layers, in Qwen3's and Llama's terms."""

TABLES = ("embed_tokens.weight", "lm_head.weight")
"""Copies of the target's, which a server has already."""


ACTIVATION = "silu"
"""Of all MLPs in servers' drafters."""

SERVABLE_LINE = "drafter.algorithm: eagle3 with drafter.layout: llama"
"""What can be served for any target."""


class CannotExportError(ValueError):
    """A format cannot express a drafter; the message names the recipe's line that would make it one that it can."""


class ServedTarget(NamedTuple):
    """What a drafter is served with."""

    name: str
    """Hub name or folder."""
    architectures: tuple[str, ...]


class Written(NamedTuple):
    """A drafter in a format."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    warnings: tuple[str, ...] = ()
    """What its reader should know, or may take otherwise."""

    def save(self, folder: Path) -> None:
        """Write both files into a folder that is there."""
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.tensors.items()}
        save_file(tensors, folder / WEIGHTS_NAME, metadata={"format": "pt"})
        (folder / CONFIG_NAME).write_text(json.dumps(self.config, indent=2) + "\n", encoding="utf-8")


class Tables(NamedTuple):
    """The target's own: embedding and head, [V, D] each."""

    embed_tokens: Tensor
    lm_head: Tensor

    @classmethod
    def of(cls, drafter: Drafter) -> Tables:
        """A drafter's copies."""
        return cls(drafter.embed_tokens.weight.detach(), drafter.lm_head.weight.detach())


def layer_values(config: PretrainedConfig) -> dict[str, Any]:
    """Values that make a draft model's layers; RoPE both where older and where newer readers look."""
    values = {name: value for name in LAYER_VALUES if (value := getattr(config, name, None)) is not None}
    rope: dict[str, Any] = dict(getattr(config, "rope_parameters", None) or {})
    values |= {"rope_parameters": rope, "rope_theta": rope.get("rope_theta"), "tie_word_embeddings": False}
    if rope.get("rope_type", "default") != "default":
        values["rope_scaling"] = rope
    return values


def refuse(server: str, what: str, line: str) -> CannotExportError:
    """The error that a writer raises: what the server lacks, and the recipe's line that avoids it."""
    return CannotExportError(f"{server} cannot express this drafter: {what}. In the recipe: {line}; then train again")


def check_any_server(drafter: Drafter, server: str) -> None:
    """Refuse what no server has.

    Raises:
        CannotExportError: The drafter is a benchmark's control, or its MLPs have another activation than servers' do.
    """
    if drafter.settings.permute_context:
        raise refuse(
            server, "it was trained as a control, with its context out of place", "drafter.permute_context: false"
        )
    config = drafter.config
    activation = getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", ACTIVATION)
    if activation != ACTIVATION:
        raise refuse(server, f"its MLPs use {ACTIVATION}, and these {activation}, as the target does", SERVABLE_LINE)


def check_block_family(drafter: Drafter, server: str) -> None:
    """Refuse block drafters whose layers are not Qwen3's, the only ones that servers' block drafters have.

    Raises:
        CannotExportError: They are not.
    """
    if drafter.family.name != "qwen3":
        raise refuse(
            server,
            f"its block drafters have Qwen3's layers, and these are {drafter.family.name}'s",
            SERVABLE_LINE,
        )


def check_one_layer(drafter: Drafter, server: str) -> None:
    """Refuse Eagle3 drafters of several layers: servers give the embedding to the first alone.

    Raises:
        CannotExportError: There are several.
    """
    if drafter.settings.num_draft_layers != 1:
        raise refuse(
            server,
            f"its Eagle3 layers after the first see no embedding, and all {drafter.settings.num_draft_layers} of these "
            "do",
            "drafter.num_draft_layers: 1",
        )


def vocabulary_tensors(drafter: Eagle3Drafter) -> dict[str, Tensor]:
    """``d2t`` int64 [Vd], offsets, ``t2d`` bool [V] and the head's rows [Vd, D]; all of them where nothing is cut."""
    tokens, vocab_size = drafter.drafted_tokens, int(drafter.config.vocab_size)
    tokens = torch.arange(vocab_size) if tokens is None else tokens.cpu()
    kept = torch.zeros(vocab_size, dtype=torch.bool)
    kept[tokens] = True
    head = drafter.lm_head.weight.detach().cpu()[tokens]
    return {"d2t": tokens - torch.arange(len(tokens)), "t2d": kept, "lm_head.weight": head}


def take_vocabulary(path: Path, tensors: dict[str, Tensor], lm_head: Tensor) -> Tensor | None:
    """Take ``d2t``, ``t2d`` and the head's rows out of a file's tensors, and put the rows into the target's head.

    Args:
        path: Of the file, for messages.
        tensors: From it; the three are removed.
        lm_head: [V, D] of the target; the file's rows take the place of its own.

    Returns:
        d2t, or None where nothing is cut; ``tensors`` has the whole head.

    Raises:
        CheckpointFormatError: The three contradict each other.
    """
    offsets, kept, rows = tensors.pop("d2t", None), tensors.pop("t2d", None), tensors.pop("lm_head.weight", None)
    if rows is None:
        raise CheckpointFormatError(f"{path} lacks lm_head.weight")
    whole = lm_head.clone()
    tensors["lm_head.weight"] = whole
    if offsets is None:
        tokens = torch.arange(len(whole))
    else:
        try:
            check_offsets(offsets, len(whole))
        except ValueError as error:
            raise CheckpointFormatError(f"{path}: {error}") from error
        tokens = offsets + torch.arange(len(offsets))
    if rows.shape != (len(tokens), whole.shape[1]):
        raise CheckpointFormatError(
            f"{path}: lm_head.weight is {list(rows.shape)} instead of {[len(tokens), whole.shape[1]]}"
        )
    if kept is not None and (kept.dtype != torch.bool or kept.nonzero().squeeze(1).tolist() != tokens.tolist()):
        raise CheckpointFormatError(f"{path}: t2d must be bool, true for exactly the tokens that d2t gives")
    whole[tokens] = rows.to(whole.dtype)
    return None if len(tokens) == len(whole) else offsets


def rebuild(
    path: Path,
    values: Mapping[str, Any],
    settings: Mapping[str, Any],
    num_target_layers: int,
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype,
) -> Drafter:
    """The drafter that a config and tensors in native names describe; on the CPU and in evaluation mode.

    Args:
        path: Of the tensors' file, for messages.
        values: Of the draft model's config; its model type says which family.
        settings: Fields of `DrafterConfig`, the algorithm among them.
        num_target_layers: Of the target.
        tensors: All of them, in native names.
        dtype: What to compute in.

    Raises:
        CheckpointFormatError: They describe none.
    """
    try:
        model_type = values["model_type"]
        family = find_family(model_type)
        config = family.read_config({name: value for name, value in values.items() if name != "rope_scaling"})
        resolved = DrafterConfig(**settings).resolve(
            num_target_layers=num_target_layers, vocab_size=config.vocab_size, model_type=model_type
        )
        with torch.device("meta"):
            drafter = find_algorithm(resolved.algorithm).load()(config, resolved, family)
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointFormatError(f"{path.parent / CONFIG_NAME} describes no drafter: {error}") from error
    drafter.reset_buffers()
    check_tensors(path, tensors, drafter.state_dict())
    cast = {
        name: tensor.to(dtype if tensor.is_floating_point() else tensor.dtype, copy=True)
        for name, tensor in tensors.items()
    }
    drafter.load_state_dict(cast, assign=True)
    return drafter.eval()
