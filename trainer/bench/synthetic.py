"""A target that computes nothing: its features lie in memory, and all that a capture of it costs is the way out.

Shape letters: T tokens, L captured layers, D hidden size, C = L·D.
"""

from __future__ import annotations

import time

import torch

from services.contracts import CaptureJob, TableSignature, TargetDescription, WireDtype
from services.target.packing import CapturedFeatures, Packing, PackingRoom
from services.target.request import CaptureInputs

FINGERPRINT = "synthetic"
VOCAB_SIZE = 1000


class SyntheticEngine:
    """Gives every capture the same prepared features: as they lie in memory in bf16, converted for any other dtype.

    Args:
        num_tokens: T of every sample.
        layer_ids: Captured layers.
        hidden_size: D.
        pause_s: How long a capture takes, for a target that is slower than the way out of it.
    """

    def __init__(self, num_tokens: int, layer_ids: tuple[int, ...], hidden_size: int, pause_s: float = 0.0) -> None:
        generator = torch.Generator().manual_seed(0)
        self._hidden_size = hidden_size
        self._pause_s = pause_s
        self._context_TC = torch.randn(num_tokens, len(layer_ids) * hidden_size, generator=generator).bfloat16()
        self._last_TD = torch.randn(num_tokens, hidden_size, generator=generator).bfloat16()
        self._room = PackingRoom(torch.device("cpu"))
        self._description = TargetDescription(
            model_name="synthetic",
            fingerprint=FINGERPRINT,
            num_layers=max(layer_ids) + 2,
            hidden_size=hidden_size,
            vocab_size=VOCAB_SIZE,
            dtype="bfloat16",
            max_tokens=num_tokens,
            engine="synthetic",
        )

    def describe(self) -> TargetDescription:
        """What this target is."""
        return self._description

    def capture(self, batch: list[CaptureInputs]) -> list[CapturedFeatures]:
        """The prepared features, whatever the tokens."""
        time.sleep(self._pause_s * len(batch))
        return [self._features(inputs) for inputs in batch]

    def check(self) -> None:
        """Memory does not fail."""

    def _features(self, inputs: CaptureInputs) -> CapturedFeatures:
        if inputs.dtype == "bf16":
            return CapturedFeatures(self._context_TC, self._last_TD)
        packing = Packing(
            self._room,
            num_tokens=len(self._context_TC),
            num_last=len(self._last_TD),
            num_layers=len(inputs.layer_ids),
            hidden_size=self._hidden_size,
            dtype=inputs.dtype,
        )
        for position, layer_TD in enumerate(self._context_TC.split(self._hidden_size, dim=1)):
            packing.put_layer(position, layer_TD)
        packing.put_last(self._last_TD)
        return packing.finish()


def synthetic_signature(layer_ids: tuple[int, ...], hidden_size: int, wire_dtype: WireDtype) -> TableSignature:
    """Of a table that holds this target's samples."""
    return TableSignature(fingerprint=FINGERPRINT, layer_ids=layer_ids, hidden_size=hidden_size, dtype=wire_dtype)


def synthetic_job(capture: int, num_tokens: int) -> CaptureJob:
    """A capture of all rows of all layers, the last one's included."""
    return CaptureJob(
        capture=capture,
        prompt=capture,
        epoch=0,
        input_ids=(1,) * num_tokens,
        loss_mask=(1,) * num_tokens,
        last_rows=tuple(range(num_tokens)),
    )
