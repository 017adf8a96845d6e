"""A target whose features follow from its token ids: everything about it is real but the model."""

from __future__ import annotations

import torch

from services.codec import pack_rows
from services.contracts import CaptureJob, TargetDescription
from services.target.client import TargetClient
from services.target.config import TargetConfig
from services.target.packing import CapturedFeatures
from services.target.request import CaptureInputs

WIDTH, VOCAB, LAYERS, MAX_TOKENS = 8, 50, 4, 256
WAIT_S = 120.0

CONFIG = TargetConfig(model="synthetic", num_gpus=0, max_concurrent_captures=4, batch_wait_ms=0)


class SyntheticEngine:
    """Row t of every feature is token id t."""

    def __init__(self, width: int = WIDTH) -> None:
        self.width = width

    def describe(self) -> TargetDescription:
        return TargetDescription(
            model_name="synthetic",
            fingerprint="f00d",
            num_layers=LAYERS,
            hidden_size=self.width,
            vocab_size=VOCAB,
            dtype="float32",
            max_tokens=MAX_TOKENS,
            engine="synthetic",
        )

    def capture(self, batch: list[CaptureInputs]) -> list[CapturedFeatures]:
        return [self._features(inputs) for inputs in batch]

    def _features(self, inputs: CaptureInputs) -> CapturedFeatures:
        answer, rows = (), inputs.last_rows
        if inputs.generate is not None:
            answer = (1,) * inputs.generate.max_new_tokens
            rows = tuple(inputs.generate.last_rows.select([0] * len(inputs.input_ids) + [1] * len(answer)))
        tokens = torch.tensor([*inputs.input_ids, *answer], dtype=torch.float32)[:, None]
        context = tokens.expand(-1, len(inputs.layer_ids) * self.width).contiguous()
        last = tokens[list(rows)].expand(-1, self.width).contiguous()
        return CapturedFeatures(
            context=pack_rows(context, inputs.dtype, self.width),
            last=pack_rows(last, inputs.dtype, self.width),
            answer=answer,
        )

    def check(self) -> None:
        """A synthetic target's device does not fail."""


def a_job(length: int = 5) -> CaptureJob:
    return CaptureJob(
        capture=1,
        prompt=0,
        epoch=0,
        input_ids=tuple(range(length)),
        loss_mask=(1,) * length,
        last_rows=(length - 1,),
    )


def capture_rows(client: TargetClient, job: CaptureJob) -> dict[str, int]:
    """Capture a job; how many rows of each tensor came."""
    rows = {"context": 0, "last": 0}
    for chunk, _ in client.capture(job, layer_ids=(0, 2), wire_dtype="fp32", chunk_bytes=256, timeout_s=WAIT_S):
        rows[chunk.tensor] += chunk.row_end - chunk.row_start
    return rows
