"""The native checkpoint: a folder with ``config.json`` and ``model.safetensors`` (specs: checkpoints, "Native").

The format is the reference toolkit's, so its checkpoints load here and ours load there.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from drafters.config import FOREIGN_SETTINGS, DrafterConfig
from drafters.drafter import Drafter
from drafters.registry import algorithm_of_architecture, find_algorithm, find_family
from drafters.vocabulary import check_offsets

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"

LOSS_KEYS = ("loss_decay_gamma", "ce_loss_alpha", "l1_loss_alpha", "confidence_head_alpha")
BLOCK_KEYS = ("block_size", "mask_token_id", "num_anchors", "target_layer_ids", "markov_rank", "enable_confidence_head")
EAGLE3_KEYS = ("ttt_length", "step_loss_decay", "target_layer_ids")

WRITTEN: Mapping[str, tuple[str, ...]] = {
    "dspark": BLOCK_KEYS + LOSS_KEYS,
    "dflash": BLOCK_KEYS + LOSS_KEYS,
    "eagle3": EAGLE3_KEYS,
}
"""Settings that stand in ``config.json`` under their own names, by algorithm."""

WRITTEN_IF_NOT_DEFAULT = ("permute_context", "sample_from_anchor", "layout", "draft_vocab_size")
"""Settings that the reference does not have: absent, they are at their defaults."""

NEVER_GUESSED: Mapping[str, tuple[str, ...]] = {
    "dspark": ("block_size", "mask_token_id", "target_layer_ids", "markov_rank", "enable_confidence_head"),
    "dflash": ("block_size", "mask_token_id", "target_layer_ids", "markov_rank", "enable_confidence_head"),
    "eagle3": EAGLE3_KEYS,
}
"""Settings that a checkpoint must have."""


class CheckpointFormatError(ValueError):
    """A folder is no drafter checkpoint that this version can read."""


def save_drafter(drafter: Drafter, folder: Path | str) -> None:
    """Write a native checkpoint; ``load_drafter`` reads it back. The folder is made if need be.

    Args:
        drafter: Whose config and weights; the weights keep their dtype.
        folder: Where to.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in drafter.state_dict().items()}
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
    values = read_values(folder / CONFIG_NAME)
    try:
        settings = _settings_of(values)
    except ValueError as error:
        raise CheckpointFormatError(f"{folder / CONFIG_NAME}: {error}") from error
    try:
        family = find_family(values["model_type"])
        config = family.read_config(_without(values, ("rope_theta",) if values.get("rope_parameters") else ()))
        with torch.device("meta"):  # no time or memory for weights that are about to be replaced
            drafter = find_algorithm(settings.algorithm).load()(config, settings, family)
    except (ValueError, KeyError, TypeError, ZeroDivisionError, StrictDataclassError) as error:
        raise CheckpointFormatError(f"{folder / CONFIG_NAME} describes no draft layers: {error}") from error
    drafter.reset_buffers()
    tensors = read_tensors(folder / WEIGHTS_NAME)
    check_tensors(folder / WEIGHTS_NAME, tensors, drafter.state_dict())
    _check_vocabulary(folder / WEIGHTS_NAME, tensors.get("d2t"), drafter.config.vocab_size)
    drafter.load_state_dict({name: _cast(tensor, dtype) for name, tensor in tensors.items()}, assign=True)
    return drafter.eval()


def stored_dtype(folder: Path | str) -> torch.dtype:
    """What dtype a checkpoint's weights are in.

    Raises:
        CheckpointFormatError: The file is missing or broken, or no drafter's.
    """
    path = Path(folder) / WEIGHTS_NAME
    try:
        with safe_open(path, "pt") as file:
            dtype: torch.dtype = file.get_tensor("fc.weight").dtype
    except (OSError, SafetensorError) as error:
        raise CheckpointFormatError(f"cannot read {path}: {error}") from error
    return dtype


def checkpoint_config(drafter: Drafter) -> dict[str, Any]:
    """What ``config.json`` says: the draft model's config and the drafter's settings."""
    settings = drafter.settings
    config: dict[str, Any] = drafter.config.to_dict()
    config.update(settings.model_dump(mode="json", include=set(WRITTEN[drafter.algorithm])))
    config["architectures"] = [drafter.family.architecture_prefix + find_algorithm(drafter.algorithm).architecture]
    if settings.markov_rank:
        config["markov_head_type"] = settings.markov_head_type
    if settings.enable_confidence_head:
        config["confidence_head_with_markov"] = settings.confidence_head_with_markov
    if drafter.algorithm == "eagle3":
        config["draft_num_hidden_layers"] = settings.num_draft_layers
        config.setdefault("target_model_name_or_path", "")
    for name in WRITTEN_IF_NOT_DEFAULT:
        if getattr(settings, name) != DrafterConfig.model_fields[name].default:
            config[name] = getattr(settings, name)
    theta = (config.get("rope_parameters") or {}).get("rope_theta")
    if theta is not None:
        config["rope_theta"] = theta  # where older readers look
    return config


def _settings_of(values: Mapping[str, Any]) -> DrafterConfig:
    """What ``config.json`` says of the drafter itself.

    Raises:
        ValueError: It lacks something, or says what no drafter is.
    """
    model_type = _entry(values, "model_type", str)
    architectures = _entry(values, "architectures", list) or [None]
    has_heads = bool(values.get("markov_rank") or values.get("enable_confidence_head"))
    algorithm = algorithm_of_architecture(str(architectures[0]), model_type, has_heads=has_heads)
    foreign = FOREIGN_SETTINGS[algorithm]
    given = {name: values[name] for name in DrafterConfig.model_fields if name in values and name not in foreign}
    given |= {name: _entry(values, name) for name in NEVER_GUESSED[algorithm] if name not in foreign}
    given |= {"algorithm": algorithm, "num_draft_layers": _entry(values, "num_hidden_layers", int)}
    return DrafterConfig(**given).resolve(
        num_target_layers=_entry(values, "num_target_layers", int),
        vocab_size=_entry(values, "vocab_size", int),
        model_type=model_type,
    )


def _entry(values: Mapping[str, Any], name: str, kind: type = object) -> Any:
    """A value that must be there and of a kind; null is as good as none."""
    value = values.get(name)
    if value is None:
        raise ValueError(f"lacks {name!r}: it is no drafter's config")
    if not isinstance(value, kind):
        raise ValueError(f"{name!r} must be of type {kind.__name__}, not {value!r}")
    return value


def check_tensors(path: Path, tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Check that a file's tensors are those that are wanted, by name and shape.

    Raises:
        CheckpointFormatError: They are not; the message names them.
    """
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


def _check_vocabulary(path: Path, offsets: Tensor | None, vocab_size: int) -> None:
    if offsets is None:
        return
    try:
        check_offsets(offsets, vocab_size)
    except ValueError as error:
        raise CheckpointFormatError(f"{path}: {error}") from error


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy to compute with; token ids stay whole numbers."""
    return tensor.to(dtype if tensor.is_floating_point() else tensor.dtype, copy=True)


def read_values(path: Path) -> dict[str, Any]:
    """The values of a config file.

    Raises:
        CheckpointFormatError: It cannot be read, or holds no JSON object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointFormatError(f"cannot read {path}: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointFormatError(f"{path} must hold a JSON object, not {type(values).__name__}")
    return values


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        CheckpointFormatError: It cannot be read.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointFormatError(f"cannot read {path}: {error}") from error


def _without(values: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}
