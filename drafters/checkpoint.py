"""The native checkpoint: a folder with ``config.json`` and ``model.safetensors`` (specs: checkpoints, "Native").

The format is the reference toolkit's, so its checkpoints load here and ours load there.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from drafters.config import DrafterConfig
from drafters.drafter import Drafter
from drafters.registry import algorithm_of_architecture, find_algorithm, find_family

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"

ALWAYS_WRITTEN = (
    "block_size",
    "mask_token_id",
    "num_anchors",
    "target_layer_ids",
    "markov_rank",
    "enable_confidence_head",
    "loss_decay_gamma",
    "ce_loss_alpha",
    "l1_loss_alpha",
    "confidence_head_alpha",
)
"""Settings that stand in ``config.json`` under their own names, whatever the drafter."""


class CheckpointFormatError(ValueError):
    """A folder is no drafter checkpoint that this version can read."""


def save_drafter(
    drafter: Drafter,
    folder: Path | str,
    *,
    state_dict: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a native checkpoint; ``load_drafter`` reads it back. The folder is made if need be.

    Args:
        drafter: Whose config and weights.
        folder: Where to.
        state_dict: The weights, if the drafter's own are sharded.
        dtype: What to store the weights in; None keeps theirs.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = drafter.state_dict() if state_dict is None else state_dict
    tensors = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in weights.items()}
    save_file(tensors, folder / WEIGHTS_NAME, metadata={"format": "pt"})
    config = checkpoint_config(drafter)
    config["dtype"] = str(tensors["fc.weight"].dtype).removeprefix("torch.")
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def load_drafter(folder: Path | str, dtype: torch.dtype = torch.float32) -> Drafter:
    """Read a native checkpoint; the drafter is on the CPU and in evaluation mode.

    Args:
        folder: Holds ``config.json`` and ``model.safetensors``.
        dtype: What to compute in.

    Raises:
        CheckpointFormatError: A file is missing or broken, algorithm or family is unknown, or tensors are missing,
            unknown or of another shape; the message names them.
    """
    folder = Path(folder)
    values = _read_json(folder / CONFIG_NAME)
    try:
        family = find_family(values["model_type"])
        algorithm = algorithm_of_architecture(values["architectures"][0], values["model_type"])
        settings = _settings_of(values, algorithm).resolve(
            num_target_layers=values["num_target_layers"],
            vocab_size=values["vocab_size"],
            model_type=values["model_type"],
        )
        config = family.config.from_dict(_without(values, ("rope_theta",) if values.get("rope_parameters") else ()))
        with torch.device("meta"):  # no time or memory for weights that are about to be replaced
            drafter = find_algorithm(algorithm).load()(config, settings, family)
    except (KeyError, IndexError) as error:
        raise CheckpointFormatError(f"{folder / CONFIG_NAME} lacks {error}: it is no drafter's config") from error
    except ValueError as error:
        raise CheckpointFormatError(f"{folder / CONFIG_NAME}: {error}") from error
    drafter.reset_buffers()
    tensors = _read_tensors(folder / WEIGHTS_NAME)
    _check_tensors(folder / WEIGHTS_NAME, tensors, drafter.state_dict())
    drafter.load_state_dict({name: tensor.to(dtype, copy=True) for name, tensor in tensors.items()}, assign=True)
    return drafter.eval()


def checkpoint_config(drafter: Drafter) -> dict[str, Any]:
    """What ``config.json`` says: the draft model's config and the drafter's settings."""
    settings = drafter.settings
    config: dict[str, Any] = drafter.config.to_dict()
    config.update(settings.model_dump(mode="json", include=set(ALWAYS_WRITTEN)))
    config["architectures"] = [drafter.family.architecture_prefix + find_algorithm(drafter.algorithm).architecture]
    if settings.markov_rank:
        config["markov_head_type"] = settings.markov_head_type
    if settings.enable_confidence_head:
        config["confidence_head_with_markov"] = settings.confidence_head_with_markov
    if settings.permute_context:
        config["permute_context"] = True
    rope = config.get("rope_parameters") or {}
    if "rope_theta" in rope:
        config["rope_theta"] = rope["rope_theta"]  # where older readers look
    return config


@torch.no_grad()
def copy_target_embeddings(drafter: Drafter, target_folder: Path | str) -> None:
    """Copy the target's embedding table and head into a drafter, from the safetensors of its folder.

    Raises:
        CheckpointFormatError: The folder has no safetensors, lacks a table, or its shape is not the drafter's.
    """
    folder = Path(target_folder)
    config = _read_json(folder / CONFIG_NAME)
    homes = _tensor_homes(folder)
    embedding = _one_named(homes, "embed_tokens.weight", folder)
    tied = (config.get("text_config") or config).get("tie_word_embeddings", config.get("tie_word_embeddings"))
    has_head = any(_is_named(name, "lm_head.weight") for name in homes)
    if tied is False and not has_head:
        raise CheckpointFormatError(f"{folder}: no lm_head.weight, though tie_word_embeddings is false")
    head = embedding if tied or not has_head else _one_named(homes, "lm_head.weight", folder)
    for own, name in ((drafter.embed_tokens, embedding), (drafter.lm_head, head)):
        with safe_open(homes[name], "pt") as file:
            tensor = file.get_tensor(name)
        if tensor.shape != own.weight.shape:
            raise CheckpointFormatError(
                f"{homes[name]}: {name} is {list(tensor.shape)}, but the drafter's is {list(own.weight.shape)}: "
                "was the drafter built for this target?"
            )
        own.weight.copy_(tensor)


def _settings_of(values: Mapping[str, Any], algorithm: str) -> DrafterConfig:
    given = {name: values[name] for name in DrafterConfig.model_fields if name in values}
    for name in ("block_size", "mask_token_id", "target_layer_ids", "markov_rank", "enable_confidence_head"):
        given[name] = values[name]  # never guessed
    return DrafterConfig(**(given | {"algorithm": algorithm, "num_draft_layers": values["num_hidden_layers"]}))


def _check_tensors(path: Path, tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    missing = sorted(wanted.keys() - tensors.keys())
    unknown = sorted(tensors.keys() - wanted.keys())
    shapes = [
        f"{name} is {list(tensors[name].shape)} instead of {list(wanted[name].shape)}"
        for name in sorted(wanted.keys() & tensors.keys())
        if tensors[name].shape != wanted[name].shape
    ]
    lists = (("missing tensors", missing), ("unknown tensors", unknown), ("wrong shapes", shapes))
    problems = [f"{what}: {', '.join(names)}" for what, names in lists if names]
    if problems:
        raise CheckpointFormatError(f"{path} does not fit its config.json; " + "; ".join(problems))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointFormatError(f"cannot read {path}: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointFormatError(f"{path} must hold a JSON object, not {type(values).__name__}")
    return values


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointFormatError(f"cannot read {path}: {error}") from error


def _tensor_homes(folder: Path) -> dict[str, Path]:
    """Which file of a folder holds which tensor."""
    homes: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "pt") as file:
                homes.update(dict.fromkeys(file.keys(), path))
        except (OSError, SafetensorError) as error:
            raise CheckpointFormatError(f"cannot read {path}: {error}") from error
    if not homes:
        raise CheckpointFormatError(f"{folder} has no *.safetensors: convert the target's weights to safetensors")
    return homes


def _is_named(name: str, ending: str) -> bool:
    return name == ending or name.endswith("." + ending)


def _one_named(names: Iterable[str], ending: str, folder: Path) -> str:
    found = [name for name in names if _is_named(name, ending)]
    if len(found) != 1:
        raise CheckpointFormatError(f"{folder} must have one tensor named {ending}, it has: {found or 'none'}")
    return found[0]


def _without(values: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}
