"""What a new drafter takes from its target: embedding table, head and, if asked, whole layers to begin with."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from drafters.backbone import BlockBackbone
from drafters.drafter import Drafter

EMBEDDING = "embed_tokens.weight"
"""How the token embedding's name ends in every family."""


class TargetWeightsError(ValueError):
    """A target's folder lacks a tensor that the drafter needs, or has it in another shape."""


class TargetWeights:
    """The tensors in a target's safetensors, found by how their names end."""

    def __init__(self, folder: Path | str) -> None:
        """Read the names of all tensors; their values are read when asked for.

        Raises:
            TargetWeightsError: The folder has no readable safetensors.
        """
        self._folder = Path(folder)
        self._homes: dict[str, Path] = {}
        for path in sorted(self._folder.glob("*.safetensors")):
            try:
                with safe_open(path, "pt") as file:
                    self._homes.update(dict.fromkeys(file.keys(), path))
            except (OSError, SafetensorError) as error:
                raise TargetWeightsError(f"cannot read {path}: {error}") from error
        if not self._homes:
            raise TargetWeightsError(f"{self._folder} has no *.safetensors: convert its weights to safetensors")

    def has(self, ending: str) -> bool:
        """Whether a tensor's name ends so."""
        return bool(self._names(ending))

    def copy(self, ending: str, parameter: Tensor) -> None:
        """Copy the one tensor whose name ends so into a parameter, in its dtype.

        Raises:
            TargetWeightsError: There is no such tensor, there are several, or the shape differs.
        """
        self._copy(self._only_name(ending), parameter)

    def copy_of_decoder(self, name: str, parameter: Tensor) -> None:
        """Copy a tensor of the decoder stack, which is where the token embedding lies.

        The other towers of a multimodal target have layers of their own.

        Raises:
            TargetWeightsError: There is no such tensor, no single token embedding, or the shape differs.
        """
        full_name = self._only_name(EMBEDDING).removesuffix(EMBEDDING) + name
        if full_name not in self._homes:
            raise TargetWeightsError(f"{self._folder} has no tensor named {full_name}")
        self._copy(full_name, parameter)

    def _copy(self, name: str, parameter: Tensor) -> None:
        with safe_open(self._homes[name], "pt") as file:
            tensor = file.get_tensor(name)
        if tensor.shape != parameter.shape:
            raise TargetWeightsError(
                f"{self._homes[name]}: {name} is {list(tensor.shape)}, but the drafter's is "
                f"{list(parameter.shape)}: was the drafter built for this target?"
            )
        parameter.copy_(tensor)

    def _only_name(self, ending: str) -> str:
        names = self._names(ending)
        if len(names) != 1:
            raise TargetWeightsError(f"{self._folder} must have one tensor named {ending}, it has: {names or 'none'}")
        return names[0]

    def _names(self, ending: str) -> list[str]:
        return [name for name in self._homes if name == ending or name.endswith("." + ending)]


@torch.no_grad()
def copy_target_embeddings(drafter: Drafter, target_folder: Path | str) -> None:
    """Copy the target's embedding table and head into a drafter.

    Raises:
        TargetWeightsError: The folder has no safetensors, lacks a table, its shape is not the drafter's, or the head
            has a bias.
    """
    _read_tables(target_folder, drafter.embed_tokens.weight, drafter.lm_head.weight)


@torch.no_grad()
def differing_tables(drafter: Drafter, target_folder: Path | str) -> list[str]:
    """Which of a drafter's tables are not the target's, in the drafter's dtype: a server drafts with the target's.

    Raises:
        TargetWeightsError: As `copy_target_embeddings`.
    """
    ours = {"embed_tokens": drafter.embed_tokens.weight, "lm_head": drafter.lm_head.weight}
    theirs = [torch.empty_like(table) for table in ours.values()]
    _read_tables(target_folder, *theirs)
    return [name for (name, table), other in zip(ours.items(), theirs, strict=True) if not torch.equal(table, other)]


def _read_tables(target_folder: Path | str, embedding: Tensor, head: Tensor) -> None:
    weights, tied = TargetWeights(target_folder), _is_tied(Path(target_folder))
    weights.copy(EMBEDDING, embedding)
    if tied is False and not weights.has("lm_head.weight"):
        raise TargetWeightsError(f"{target_folder}: no lm_head.weight, though tie_word_embeddings is false")
    if weights.has("lm_head.bias"):
        raise TargetWeightsError(f"{target_folder}: its head has a bias, lm_head.bias, and a drafter's has none")
    weights.copy(EMBEDDING if tied or not weights.has("lm_head.weight") else "lm_head.weight", head)


@torch.no_grad()
def copy_target_layers(drafter: Drafter, target_folder: Path | str, layer_ids: Sequence[int]) -> None:
    """Begin with layers of the target instead of random ones, one for each draft layer.

    The target's layers already attend to the right places, which a random drafter takes most of its first thousand
    steps to learn. Context enters as the deepest captured features, normed as the last of these layers expects them;
    the other captured layers keep their small random weights in ``fc``.

    Args:
        drafter: Changed in place; everything but `fc`'s other columns, Markov and confidence head is replaced.
        target_folder: Hugging Face folder of the target.
        layer_ids: Target layers, one a draft layer, in order.

    Raises:
        TargetWeightsError: The drafter's layers are not the target's kind, or the target lacks one of these.
    """
    if not isinstance(drafter, BlockBackbone):
        raise TargetWeightsError(f"the layers of {drafter.algorithm} are not the target's: unset warm_start_layers")
    weights, text_values = TargetWeights(target_folder), _text_values(Path(target_folder))
    for layer, layer_id in zip(drafter.layers, layer_ids, strict=True):
        try:
            drafter.family.check_warm_start(text_values, layer_id)
        except ValueError as error:
            raise TargetWeightsError(str(error)) from error
        for name, parameter in layer.named_parameters():
            weights.copy_of_decoder(f"layers.{layer_id}.{name}", parameter)
    last_norm = f"layers.{layer_ids[-1]}.input_layernorm.weight"
    weights.copy_of_decoder(last_norm, drafter.hidden_norm.get_parameter("weight"))
    weights.copy_of_decoder("norm.weight", drafter.norm.get_parameter("weight"))
    width = drafter.fc.weight.shape[0]
    drafter.fc.weight[:, -width:] = torch.eye(width)


def _is_tied(folder: Path) -> bool | None:
    outer = _read_config(folder)
    tied: bool | None = _text_values(folder).get("tie_word_embeddings", outer.get("tie_word_embeddings"))
    return tied


def _text_values(folder: Path) -> dict[str, Any]:
    outer = _read_config(folder)
    values: dict[str, Any] = outer.get("text_config") or outer
    return values


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TargetWeightsError(f"cannot read {path}: {error}") from error
    return config
