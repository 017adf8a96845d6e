"""Take hidden states out of a transformers model with forward hooks on the wanted layers only."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn


def decoder_of(model: nn.Module) -> nn.Module:
    """The decoder stack of a causal LM: the module that owns ``layers``, ``embed_tokens`` and the final ``norm``.

    A decoder stack is its own.
    """
    if hasattr(model, "layers"):
        return model
    for name in ("model", "language_model", "model.language_model"):
        try:
            decoder = model.get_submodule(name)
        except AttributeError:
            continue
        if hasattr(decoder, "layers"):
            return decoder
    raise ValueError(f"{type(model).__name__} has no decoder stack at model, language_model or model.language_model")


class FeatureTap:
    """Context manager that keeps the raw outputs of chosen decoder layers of each forward pass.

    Layer id ``i`` is the output of decoder layer i (0-based), ``-1`` the embedding output (specs/drafters.md, "What
    the target gives").
    """

    def __init__(self, model: nn.Module, layer_ids: Sequence[int]) -> None:
        self._decoder: Any = decoder_of(model)
        self._layer_ids = tuple(layer_ids)
        self._outputs: dict[int, Tensor] = {}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> Self:
        for layer_id in self._layer_ids:
            module = self._decoder.embed_tokens if layer_id == -1 else self._decoder.layers[layer_id]
            self._handles.append(module.register_forward_hook(self._keep(layer_id)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._handles:
            self._handles.pop().remove()
        self._outputs.clear()

    def _keep(self, layer_id: int) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            self._outputs[layer_id] = output[0] if isinstance(output, tuple) else output

        return hook

    def take(self) -> list[Tensor]:
        """The outputs of the last forward pass, one [B, T, D] tensor a layer id, in order; forgets them."""
        outputs, self._outputs = self._outputs, {}
        return [outputs[layer_id] for layer_id in self._layer_ids]
