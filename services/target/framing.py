"""FeatureChunk messages without running their payload through the protobuf codec.

The payload is the last field of the message. The sender joins encoded metadata, the payload's field header and the
tensor's memory once; the receiver walks the tags of the short prefix and hands out a view of the rest. What travels is
an ordinary FeatureChunk that any protobuf client reads and writes.
"""

from __future__ import annotations

from typing import NamedTuple

from google.protobuf.message import DecodeError

from services.errors import WireError
from services.wire import target_pb2 as wire

_LENGTH_DELIMITED = 2
_PAYLOAD_TAG = wire.FeatureChunk.PAYLOAD_FIELD_NUMBER << 3 | _LENGTH_DELIMITED
_MAX_VARINT_BYTES = 10


class FramedChunk(NamedTuple):
    """A FeatureChunk whose payload lies outside the message; `header.payload` stays empty."""

    header: wire.FeatureChunk
    payload: memoryview


def pack(chunk: FramedChunk) -> bytes:
    """Serialize a chunk; the payload is copied once, into the result."""
    return b"".join(parts_of(chunk))


def parts_of(chunk: FramedChunk) -> list[bytes | memoryview]:
    """A serialized chunk in pieces, to be joined; nothing of the payload is copied."""
    parts: list[bytes | memoryview] = [chunk.header.SerializeToString()]
    if chunk.payload.nbytes:  # proto3 leaves an empty field out
        parts += [write_varint(_PAYLOAD_TAG), write_varint(chunk.payload.nbytes), chunk.payload]
    return parts


def unpack(message: bytes | memoryview) -> FramedChunk:
    """Parse a serialized FeatureChunk; the payload is a view into `message`.

    Fields may come in any order, as protobuf allows; unknown ones are kept with the header.

    Raises:
        WireError: The bytes are no FeatureChunk.
    """
    view = memoryview(message)
    metadata: list[memoryview] = []
    payload = view[:0]
    position = 0
    while position < len(view):
        start = position
        tag, position = read_varint(view, position)
        if tag == _PAYLOAD_TAG:
            num_bytes, position = read_varint(view, position)
            end = _advance(view, position, num_bytes)
            payload = view[position:end]
        else:
            end = _skip(view, position, tag)
            metadata.append(view[start:end])
        position = end
    try:
        return FramedChunk(wire.FeatureChunk.FromString(b"".join(metadata)), payload)
    except DecodeError as error:
        raise WireError(f"a message of {len(view)} bytes is no FeatureChunk: {error}") from error


def _skip(view: memoryview, position: int, tag: int) -> int:
    """Where the field whose tag was just read ends."""
    match tag & 7:
        case 0:
            return read_varint(view, position)[1]
        case 1:
            return _advance(view, position, 8)
        case 2:
            num_bytes, position = read_varint(view, position)
            return _advance(view, position, num_bytes)
        case 5:
            return _advance(view, position, 4)
        case wire_type:
            raise WireError(f"a message of {len(view)} bytes is no FeatureChunk: wire type {wire_type} at {position}")


def _advance(view: memoryview, position: int, num_bytes: int) -> int:
    end = position + num_bytes
    if end > len(view):
        raise WireError(f"a FeatureChunk of {len(view)} bytes is cut short: a field ends at byte {end}")
    return end


def read_varint(view: memoryview, position: int) -> tuple[int, int]:
    """A base-128 varint, least significant group first, and the position after it.

    Raises:
        WireError: There is none.
    """
    value = 0
    for i in range(_MAX_VARINT_BYTES):
        if position + i >= len(view):
            raise WireError(f"a FeatureChunk of {len(view)} bytes is cut short inside a number")
        byte = view[position + i]
        value |= (byte & 0x7F) << (7 * i)
        if byte < 0x80:
            return value, position + i + 1
    raise WireError(f"a message of {len(view)} bytes is no FeatureChunk: endless number at byte {position}")


def write_varint(value: int) -> bytes:
    """A number of at least 0 as a base-128 varint."""
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
