"""Errors keep their name and message over gRPC."""

from __future__ import annotations

from typing import Any

import grpc
import pytest

from services import errors
from services.errors import ReplayError, ReplayUnavailableError, SlipstreamError, StaleGenerationError
from services.grpc_errors import ERROR_NAME, LONGEST_MESSAGE, abort, kind_of

TREE = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, SlipstreamError)]
BY_STATUS: dict[grpc.StatusCode, type[SlipstreamError]] = {grpc.StatusCode.UNAVAILABLE: ReplayUnavailableError}


class Ended(Exception):
    """What abort raises."""


class Call(grpc.RpcError):
    """Both ends of a call that is aborted."""

    def __init__(self, code: grpc.StatusCode | None = None, metadata: Any = None) -> None:
        self._code, self._metadata, self._details = code, metadata, ""

    def set_trailing_metadata(self, metadata: Any) -> None:
        self._metadata = metadata

    def abort(self, code: grpc.StatusCode, details: str) -> None:
        self._code, self._details = code, details
        raise Ended

    def code(self) -> grpc.StatusCode | None:
        return self._code

    def details(self) -> str:
        return self._details

    def trailing_metadata(self) -> Any:
        return self._metadata


@pytest.mark.parametrize("kind", TREE)
def test_error_is_raised_again_as_what_it_was(kind: type[SlipstreamError]) -> None:
    call = Call()
    with pytest.raises(Ended):
        abort(call, kind("a message"))  # type: ignore[arg-type]
    assert (call.code(), call.details()) == (grpc.StatusCode[kind.status], "a message")
    assert kind_of(call, {}, ReplayError) is kind


@pytest.mark.parametrize("metadata", [None, (), (("other", "x"),), ((ERROR_NAME, "NoSuchError"),)])
def test_status_decides_where_there_is_no_name(metadata: Any) -> None:
    assert kind_of(Call(grpc.StatusCode.UNAVAILABLE, metadata), BY_STATUS, ReplayError) is ReplayUnavailableError
    assert kind_of(Call(grpc.StatusCode.UNKNOWN, metadata), BY_STATUS, ReplayError) is ReplayError


def test_name_that_does_not_go_with_its_status_is_not_believed() -> None:
    call = Call(grpc.StatusCode.UNAVAILABLE, ((ERROR_NAME, StaleGenerationError.__name__),))
    assert kind_of(call, BY_STATUS, ReplayError) is ReplayUnavailableError


def test_endless_message_is_cut() -> None:
    call = Call()
    with pytest.raises(Ended):
        abort(call, ReplayError("x" * 100_000))  # type: ignore[arg-type]
    assert len(call.details()) == LONGEST_MESSAGE
