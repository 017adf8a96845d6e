"""What a run's features took on the wire, and what that is less than all rows of all layers in bf16. No torch.

From the tokens T and the bytes of committed captures follow the rows R of the last hidden state that travelled, since
every capture brings all its T rows of context:

    bytes = T · context row + R · last row
    all rows in bf16 = (T · L + T) · D · 2
    saved by needed_rows = (T − R) · D · 2
    saved by the dtype = (T · L + R) · D · 2 − bytes
"""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field

from services.contracts import DTYPE_BYTES, Record, TableSignature, Traffic, WireDtype


class FeatureTraffic(Record):
    """Bytes of the features of all committed captures, those made again included."""

    streamed_bytes: int = 0
    """What travelled, scales included."""
    all_rows_bytes: int = 0
    """What every row of every captured layer and of the last one takes in bf16."""
    saved_by_rows_bytes: int = 0
    """By sending only the rows of the last hidden state that the loss reads."""
    saved_by_dtype_bytes: dict[WireDtype, int] = Field(default_factory=dict)
    """By each dtype that was used; below zero where it is wider than bf16."""


def measure_traffic(traffic: Mapping[WireDtype, Traffic], signature: TableSignature) -> FeatureTraffic:
    """What travelled and what was saved, from what was counted.

    Args:
        traffic: By the dtype as which it travelled: another before a resume, perhaps.
        signature: Layers and hidden size.
    """
    state_bytes = signature.hidden_size * DTYPE_BYTES["bf16"]
    num_layers = len(signature.layer_ids)
    saved_by_rows, saved_by_dtype = 0, {}
    for dtype, counted in traffic.items():
        as_sent = signature.model_copy(update={"dtype": dtype})
        num_last = (counted.num_bytes - as_sent.sample_bytes(counted.num_tokens, 0)) // as_sent.last_row_bytes
        saved_by_rows += (counted.num_tokens - num_last) * state_bytes
        saved_by_dtype[dtype] = (counted.num_tokens * num_layers + num_last) * state_bytes - counted.num_bytes
    return FeatureTraffic(
        streamed_bytes=sum(counted.num_bytes for counted in traffic.values()),
        all_rows_bytes=cache_bytes(sum(counted.num_tokens for counted in traffic.values()), signature),
        saved_by_rows_bytes=saved_by_rows,
        saved_by_dtype_bytes=saved_by_dtype,
    )


def cache_bytes(num_tokens: int, signature: TableSignature) -> int:
    """What a feature cache on disk would take: every row of every captured layer and of the last one, in bf16."""
    return num_tokens * (len(signature.layer_ids) + 1) * signature.hidden_size * DTYPE_BYTES["bf16"]
