"""Take hidden states out of a transformers model with forward hooks on the wanted layers only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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


@contextmanager
def tapped(model: nn.Module, layer_ids: Sequence[int], take: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Have the raw outputs of chosen decoder layers taken, each as soon as it is there.

    Args:
        model: A causal LM or its decoder stack.
        layer_ids: Layer id ``i`` is the output of decoder layer i (0-based), ``-1`` the embedding output
            (specs/drafters.md, "What the target gives").
        take: Called with the layer's place in `layer_ids` and its output [B, T, D], which it does not change.
    """
    decoder: Any = decoder_of(model)
    handles: list[torch.utils.hooks.RemovableHandle] = []
    try:
        for place, layer_id in enumerate(layer_ids):
            module = decoder.embed_tokens if layer_id == -1 else decoder.layers[layer_id]
            handles.append(module.register_forward_hook(_hook(place, take)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(place: int, take: Callable[[int, Tensor], None]) -> Callable[[nn.Module, Any, Any], None]:
    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        take(place, output[0] if isinstance(output, tuple) else output)

    return hook


class FeatureTap:
    """Context manager that keeps the raw outputs of chosen decoder layers of each forward pass."""

    def __init__(self, model: nn.Module, layer_ids: Sequence[int]) -> None:
        self._num_layers = len(layer_ids)
        self._outputs: dict[int, Tensor] = {}
        self._tapped = tapped(model, layer_ids, self._outputs.__setitem__)

    def __enter__(self) -> Self:
        self._tapped.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._tapped.__exit__(kind, error, trace)
        self._outputs.clear()

    def take(self) -> list[Tensor]:
        """The outputs of the last forward pass, one [B, T, D] tensor a layer id, in order; forgets them."""
        outputs = [self._outputs[place] for place in range(self._num_layers)]
        self._outputs.clear()
        return outputs
