"""What a target refuses, and that each refusal says what and why."""

from __future__ import annotations

import pytest

from services.contracts import DEFAULT_CHUNK_BYTES, WIRE_VERSION, LastRows, TargetDescription
from services.errors import CaptureRequestError
from services.target.request import CaptureInputs, CaptureRequest, GenerateInputs, read_request
from services.wire import target_pb2 as wire

TARGET = TargetDescription(
    model_name="tiny",
    fingerprint="f",
    num_layers=6,
    hidden_size=8,
    vocab_size=100,
    dtype="float32",
    max_tokens=5,
    engine="transformers",
)


def _message(**changes: object) -> wire.CaptureRequest:
    fields: dict[str, object] = {
        "wire_version": WIRE_VERSION,
        "sample_id": 11,
        "generation": 2,
        "token_ids": [1, 2, 99],
        "layer_ids": [-1, 4, 0],
        "last_rows": [0, 2],
        "dtype": wire.BF16,
        "chunk_bytes": 48,
    }
    return wire.CaptureRequest(**{**fields, **changes})  # type: ignore[arg-type]


def test_read_request_takes_everything_over() -> None:
    inputs = CaptureInputs(input_ids=(1, 2, 99), layer_ids=(-1, 4, 0), last_rows=(0, 2), dtype="bf16")
    assert read_request(_message(), TARGET) == CaptureRequest(inputs, sample_id=11, generation=2, chunk_bytes=48)


def test_read_request_default_chunk() -> None:
    assert read_request(_message(chunk_bytes=0), TARGET).chunk_bytes == DEFAULT_CHUNK_BYTES


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"wire_version": 0}, "the caller speaks wire version 0, this target 2: run the same Slipstream version"),
        ({"wire_version": 1}, "the caller speaks wire version 1, this target 2: run the same Slipstream version"),
        ({"dtype": 0}, "dtype 0 is unknown; choose one of BF16, FP16, FP32, FP8_E4M3"),
        ({"dtype": 5}, "dtype 5 is unknown"),
        ({"token_ids": []}, "token_ids is empty"),
        ({"token_ids": [0] * 6, "last_rows": []}, "6 tokens are more than this target's max_tokens 5"),
        ({"token_ids": [1, 100, 2]}, "token id 100 at position 1 is outside the vocabulary of 100"),
        ({"layer_ids": []}, "layer_ids is empty"),
        ({"layer_ids": [1, 1]}, r"layer_ids \[1, 1\] name a layer twice"),
        ({"layer_ids": [5]}, r"layer_ids \[5\] must lie between -1 \(the embedding\) and 4"),
        ({"layer_ids": [-2]}, r"layer_ids \[-2\] must lie between -1"),
        ({"last_rows": [0, 3]}, "row 3 of a sequence of 3 tokens"),
        ({"last_rows": [1, 1]}, "must ascend without repeats, but 1 follows 1"),
        ({"chunk_bytes": 47}, r"chunk_bytes 47 must lie between 48 \(one token of 3 layers as bf16\)"),
        ({"chunk_bytes": 35, "dtype": "FP8_E4M3"}, r"between 36 \(one token of 3 layers as fp8_e4m3\)"),
        ({"chunk_bytes": 4 * 1024**2 + 1}, "and 4194304"),
    ],
)
def test_read_request_refuses(changes: dict[str, object], says: str) -> None:
    with pytest.raises(CaptureRequestError, match=says):
        read_request(_message(**changes), TARGET)


def _question(**changes: object) -> wire.CaptureRequest:
    fields: dict[str, object] = {
        "max_new_tokens": 2,
        "temperature": 0.5,
        "seed": 2**63 - 1,
        "stop_token_ids": [7],
        "last_rows": wire.AFTER,
    }
    return _message(last_rows=[], generate=wire.Generate(**{**fields, **changes}))  # type: ignore[arg-type]


def test_read_request_takes_the_wish_for_an_answer_over() -> None:
    inputs = read_request(_question(), TARGET).inputs
    assert inputs.generate == GenerateInputs(2, 0.5, 2**63 - 1, frozenset({7}), LastRows.AFTER)
    assert inputs.num_tokens == 5  # three of the prompt, two of the longest answer
    assert inputs.group != read_request(_message(), TARGET).inputs.group


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_new_tokens": 3}, "6 tokens are more than this target's max_tokens 5"),
        ({"max_new_tokens": 0}, "generate.max_new_tokens is 0"),
        ({"temperature": -1.0}, "generate.temperature -1.0 must be 0"),
        ({"temperature": float("nan")}, "generate.temperature nan must be 0"),
        ({"stop_token_ids": [7, 100]}, "generate.stop_token_ids has 100, outside the vocabulary of 100"),
        ({"last_rows": 0}, "generate.last_rows 0 is unknown; choose one of BETWEEN, AFTER"),
    ],
)
def test_wish_for_an_answer_that_cannot_be_met_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(CaptureRequestError, match=message):
        read_request(_question(**changes), TARGET)
