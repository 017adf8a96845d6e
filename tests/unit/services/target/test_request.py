"""What a target refuses, and that each refusal says what and why."""

from __future__ import annotations

import pytest

from services.contracts import DEFAULT_CHUNK_BYTES, WIRE_VERSION, TargetDescription
from services.errors import CaptureRequestError
from services.target.request import CaptureInputs, CaptureRequest, read_request
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
        ({"wire_version": 0}, "wire_version 0 is not this target's 1"),
        ({"wire_version": 2}, "wire_version 2 is not this target's 1"),
        ({"dtype": 0}, "dtype 0 is unknown; choose one of BF16, FP16, FP32"),
        ({"dtype": 4}, "dtype 4 is unknown"),
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
        ({"chunk_bytes": 4 * 1024**2 + 1}, "and 4194304"),
    ],
)
def test_read_request_refuses(changes: dict[str, object], says: str) -> None:
    with pytest.raises(CaptureRequestError, match=says):
        read_request(_message(**changes), TARGET)
