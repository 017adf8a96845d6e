"""Errors over gRPC: each travels as its status, with its message and, for our own clients, its name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NoReturn

import grpc

from services import errors
from services.errors import SlipstreamError

ERROR_NAME = "slipstream-error"
"""Trailing metadata: which of `services.errors` it is, where several share a status."""

TOO_LARGE = "Received message larger than max"
TOO_LARGE_HERE = "CLIENT: " + TOO_LARGE
"""What gRPC says, with the status RESOURCE_EXHAUSTED, of a request that a server does not read, and of an answer that
we do not."""

LONGEST_MESSAGE = 2000
"""Characters. gRPC takes 8 KiB of metadata, and a message may quote what a caller sent."""

_BY_NAME: dict[str, type[SlipstreamError]] = {
    name: kind for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, SlipstreamError)
}


def abort(context: grpc.ServicerContext, error: SlipstreamError) -> NoReturn:
    """End a call with an error."""
    context.set_trailing_metadata(((ERROR_NAME, type(error).__name__),))
    context.abort(grpc.StatusCode[error.status], str(error)[:LONGEST_MESSAGE])
    raise AssertionError("abort raises")


def kind_of(
    error: grpc.RpcError, by_status: Mapping[grpc.StatusCode, type[SlipstreamError]], default: type[SlipstreamError]
) -> type[SlipstreamError]:
    """What a failed call is to be raised as.

    Args:
        error: As gRPC raised it.
        by_status: Kinds for a status that came without a name, from gRPC itself or from another server.
        default: The kind for any other status.
    """
    for key, name in error.trailing_metadata() or ():
        kind = _BY_NAME.get(name) if key == ERROR_NAME else None
        if kind is not None and kind.status == error.code().name:
            return kind
    return by_status.get(error.code(), default)
