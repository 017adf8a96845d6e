"""The wire's names and numbers, and a Capture request held against what its target can give. No torch here."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass

from services.contracts import (
    DEFAULT_CHUNK_BYTES,
    MAX_CHUNK_BYTES,
    WIRE_VERSION,
    LastRows,
    TargetDescription,
    TensorName,
    WireDtype,
    hidden_state_bytes,
)
from services.errors import CaptureRequestError
from services.wire import target_pb2 as wire

SERVICE = wire.DESCRIPTOR.services_by_name["Target"].full_name
"""Name of the gRPC service, in front of its methods' names."""

DTYPE_TO_WIRE: dict[WireDtype, wire.WireDtype] = {
    "bf16": wire.BF16,
    "fp16": wire.FP16,
    "fp32": wire.FP32,
    "fp8_e4m3": wire.FP8_E4M3,
}
DTYPE_FROM_WIRE: dict[int, WireDtype] = {number: name for name, number in DTYPE_TO_WIRE.items()}
TENSOR_TO_WIRE: dict[TensorName, wire.TensorName] = {"context": wire.CONTEXT, "last": wire.LAST}
TENSOR_FROM_WIRE: dict[int, TensorName] = {number: name for name, number in TENSOR_TO_WIRE.items()}
LAST_ROWS_TO_WIRE: dict[LastRows, wire.LastRows] = {LastRows.BETWEEN: wire.BETWEEN, LastRows.AFTER: wire.AFTER}
LAST_ROWS_FROM_WIRE: dict[int, LastRows] = {number: rows for rows, number in LAST_ROWS_TO_WIRE.items()}


@dataclass(frozen=True, slots=True)
class GenerateInputs:
    """How a target answers one prompt; the fields are those of `services.contracts.Generation`."""

    max_new_tokens: int
    temperature: float
    seed: int
    stop_token_ids: frozenset[int]
    last_rows: LastRows


@dataclass(frozen=True, slots=True)
class CaptureInputs:
    """What one capture needs from an engine."""

    input_ids: tuple[int, ...]
    layer_ids: tuple[int, ...]
    last_rows: tuple[int, ...]
    dtype: WireDtype
    generate: GenerateInputs | None = None
    """Set if `input_ids` are a prompt that the target shall answer."""

    @property
    def num_tokens(self) -> int:
        """T, the length of the sequence, with the longest answer if there is one to come."""
        return len(self.input_ids) + (self.generate.max_new_tokens if self.generate else 0)

    @property
    def group(self) -> Hashable:
        """Equal for requests that can share a pass."""
        return self.layer_ids, self.dtype if self.generate else None


@dataclass(frozen=True, slots=True)
class CaptureRequest:
    """A checked request: what to compute, how to cut it, and how to label the pieces."""

    inputs: CaptureInputs
    sample_id: int
    generation: int
    chunk_bytes: int


def read_request(message: wire.CaptureRequest, target: TargetDescription) -> CaptureRequest:
    """Check a request against the target it came to.

    Raises:
        CaptureRequestError: The target cannot give what is asked; the message says why.
    """
    if message.wire_version != WIRE_VERSION:
        raise CaptureRequestError(
            f"the caller speaks wire version {message.wire_version}, this target {WIRE_VERSION}: "
            "run the same Slipstream version on both ends"
        )
    if message.dtype not in DTYPE_FROM_WIRE:
        names = ", ".join(wire.WireDtype.Name(number) for number in DTYPE_FROM_WIRE)
        raise CaptureRequestError(f"dtype {message.dtype} is unknown; choose one of {names}")
    inputs = CaptureInputs(
        input_ids=tuple(message.token_ids),
        layer_ids=tuple(message.layer_ids),
        last_rows=tuple(message.last_rows),
        dtype=DTYPE_FROM_WIRE[message.dtype],
        generate=_read_generate(message, target) if message.HasField("generate") else None,
    )
    _check_tokens(inputs, target)
    _check_layers(inputs.layer_ids, target)
    _check_last_rows(inputs.last_rows, len(inputs.input_ids))
    chunk_bytes = message.chunk_bytes or DEFAULT_CHUNK_BYTES
    row_bytes = len(inputs.layer_ids) * hidden_state_bytes(target.hidden_size, inputs.dtype)
    if not row_bytes <= chunk_bytes <= MAX_CHUNK_BYTES:
        raise CaptureRequestError(
            f"chunk_bytes {chunk_bytes} must lie between {row_bytes} (one token of {len(inputs.layer_ids)} layers as "
            f"{inputs.dtype}) and {MAX_CHUNK_BYTES}"
        )
    return CaptureRequest(inputs, message.sample_id, message.generation, chunk_bytes)


def _read_generate(message: wire.CaptureRequest, target: TargetDescription) -> GenerateInputs:
    wanted = message.generate
    if message.last_rows:
        raise CaptureRequestError(
            f"last_rows {list(message.last_rows)[:4]} cannot be named before the answer is there: leave them empty and "
            "set generate.last_rows"
        )
    if wanted.last_rows not in LAST_ROWS_FROM_WIRE:
        names = ", ".join(wire.LastRows.Name(number) for number in LAST_ROWS_FROM_WIRE)
        raise CaptureRequestError(f"generate.last_rows {wanted.last_rows} is unknown; choose one of {names}")
    if wanted.max_new_tokens < 1:
        raise CaptureRequestError("generate.max_new_tokens is 0; ask for at least one token")
    if not (math.isfinite(wanted.temperature) and wanted.temperature >= 0):
        raise CaptureRequestError(f"generate.temperature {wanted.temperature} must be 0 (greedy) or above")
    outside = [token for token in wanted.stop_token_ids if token >= target.vocab_size]
    if outside:
        raise CaptureRequestError(
            f"generate.stop_token_ids has {outside[0]}, outside the vocabulary of {target.vocab_size}"
        )
    return GenerateInputs(
        max_new_tokens=wanted.max_new_tokens,
        temperature=wanted.temperature,
        seed=wanted.seed,
        stop_token_ids=frozenset(wanted.stop_token_ids),
        last_rows=LAST_ROWS_FROM_WIRE[wanted.last_rows],
    )


def _check_tokens(inputs: CaptureInputs, target: TargetDescription) -> None:
    input_ids = inputs.input_ids
    if not input_ids:
        raise CaptureRequestError("token_ids is empty; send at least one token")
    if inputs.num_tokens > target.max_tokens:
        raise CaptureRequestError(
            f"{inputs.num_tokens} tokens are more than this target's max_tokens {target.max_tokens} (the smaller of "
            "the model's positions and target.max_batch_tokens; the longest answer counts); shorten prompts.max_length "
            "or raise the budget"
        )
    if max(input_ids) >= target.vocab_size:
        position = next(i for i, token in enumerate(input_ids) if token >= target.vocab_size)
        raise CaptureRequestError(
            f"token id {input_ids[position]} at position {position} is outside the vocabulary of {target.vocab_size}; "
            f"tokenise with the tokenizer of {target.model_name}"
        )


def _check_layers(layer_ids: tuple[int, ...], target: TargetDescription) -> None:
    if not layer_ids:
        raise CaptureRequestError("layer_ids is empty; name at least one layer")
    if len(set(layer_ids)) < len(layer_ids):
        raise CaptureRequestError(f"layer_ids {list(layer_ids)} name a layer twice")
    highest = target.num_layers - 2
    if min(layer_ids) < -1 or max(layer_ids) > highest:
        raise CaptureRequestError(
            f"layer_ids {list(layer_ids)} must lie between -1 (the embedding) and {highest}: the target has "
            f"{target.num_layers} layers, and the last one comes after the final norm, as last_rows"
        )


def _check_last_rows(last_rows: tuple[int, ...], num_tokens: int) -> None:
    previous = -1
    for row in last_rows:
        if row <= previous:
            raise CaptureRequestError(f"last_rows must ascend without repeats, but {row} follows {previous}")
        previous = row
    if previous >= num_tokens:
        raise CaptureRequestError(f"last_rows ask for row {previous} of a sequence of {num_tokens} tokens")
