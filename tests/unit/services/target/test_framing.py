"""Our framing against the protobuf codec, both ways, and against broken bytes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.errors import WireError
from services.target.framing import FramedChunk, pack, unpack
from services.wire import target_pb2 as wire

HEADER = wire.FeatureChunk(
    sample_id=2**40,
    generation=3,
    tensor=wire.LAST,
    row_start=7,
    row_end=9,
    row_width=16,
    dtype=wire.BF16,
    crc32c=0xFFFFFFFF,
    totals=wire.Totals(num_chunks=1, context_rows=2, last_rows=3, num_bytes=2**33),
)

headers = st.builds(
    wire.FeatureChunk,
    sample_id=st.integers(0, 2**64 - 1),
    generation=st.integers(0, 2**32 - 1),
    tensor=st.sampled_from([wire.TENSOR_NAME_UNSPECIFIED, wire.CONTEXT, wire.LAST]),
    row_start=st.integers(0, 2**32 - 1),
    row_end=st.integers(0, 2**32 - 1),
    row_width=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from([wire.BF16, wire.FP16, wire.FP32]),
    crc32c=st.integers(0, 2**32 - 1),
    totals=st.none() | st.builds(wire.Totals, num_chunks=st.integers(0, 2**32 - 1)),
)


def _whole(header: wire.FeatureChunk, payload: bytes) -> wire.FeatureChunk:
    message = wire.FeatureChunk()
    message.CopyFrom(header)
    message.payload = payload
    return message


@given(header=headers, payload=st.binary(max_size=400))
def test_pack_gives_the_bytes_of_the_protobuf_codec(header: wire.FeatureChunk, payload: bytes) -> None:
    assert pack(FramedChunk(header, memoryview(payload))) == _whole(header, payload).SerializeToString()


@given(header=headers, payload=st.binary(max_size=400))
def test_unpack_reads_the_bytes_of_the_protobuf_codec(header: wire.FeatureChunk, payload: bytes) -> None:
    framed = unpack(_whole(header, payload).SerializeToString())
    assert framed.header == header
    assert framed.payload == payload


def test_unpack_hands_out_a_view_of_the_message() -> None:
    message = pack(FramedChunk(HEADER, memoryview(b"payload")))
    payload = unpack(message).payload
    assert payload.obj is message
    assert payload.readonly


def test_unpack_accepts_fields_after_the_payload() -> None:
    message = wire.FeatureChunk(payload=b"early").SerializeToString() + HEADER.SerializeToString()
    assert unpack(message) == FramedChunk(HEADER, memoryview(b"early"))


def test_unpack_takes_the_last_of_two_payloads() -> None:
    message = b"".join(wire.FeatureChunk(payload=payload).SerializeToString() for payload in (b"one", b"two"))
    assert unpack(message).payload == b"two" == wire.FeatureChunk.FromString(message).payload


def test_unpack_is_not_misled_by_payload_bytes_inside_other_fields() -> None:
    # Field 19, unknown to us, holds what looks like a payload field.
    unknown = b"\x9a\x01\x05" + wire.FeatureChunk(payload=b"xy").SerializeToString()
    assert unpack(unknown + wire.FeatureChunk(payload=b"real").SerializeToString()).payload == b"real"


def test_unpack_skips_every_wire_type() -> None:
    fixed64, fixed32, varint = b"\x99\x01" + bytes(8), b"\x9d\x01" + bytes(4), b"\x98\x01\xac\x02"
    message = fixed64 + fixed32 + varint + wire.FeatureChunk(payload=b"p").SerializeToString()
    assert unpack(message).payload == b"p"


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_unpack_refuses_a_cut_message(cut: int) -> None:
    message = pack(FramedChunk(HEADER, memoryview(bytes(30))))
    with pytest.raises(WireError, match="cut short"):
        unpack(message[:-cut])


@pytest.mark.parametrize("garbage", [b"\xff" * 12, b"\x0b", b"\x07", b"\x00\x00"])
def test_unpack_refuses_garbage(garbage: bytes) -> None:
    with pytest.raises(WireError, match="no FeatureChunk"):
        unpack(garbage)


@given(st.binary(max_size=60))
def test_unpack_of_any_bytes_agrees_with_the_codec_or_refuses(message: bytes) -> None:
    try:
        framed = unpack(message)
    except WireError:
        return
    assert _whole(framed.header, bytes(framed.payload)) == wire.FeatureChunk.FromString(message)
