from __future__ import annotations

import grpc
import pytest

from services import errors
from services.errors import (
    ClusterError,
    NotBegunError,
    OutputDirError,
    PartDiedError,
    PausedError,
    RecipeError,
    ReplayError,
    ReplayUnavailableError,
    SlipstreamError,
    TargetError,
    TargetUnavailableError,
    UsageError,
)

TREE = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, SlipstreamError)]


@pytest.mark.parametrize("error", TREE)
def test_status_is_one_that_grpc_knows(error: type[SlipstreamError]) -> None:
    assert getattr(grpc.StatusCode, error.status) is not grpc.StatusCode.OK


@pytest.mark.parametrize("error", TREE)
def test_exit_code_is_two_for_wrong_usage_and_one_otherwise(error: type[SlipstreamError]) -> None:
    assert error.exit_code == (2 if issubclass(error, UsageError) else 1)


@pytest.mark.parametrize("error", TREE)
def test_every_error_says_when_it_is_raised(error: type[SlipstreamError]) -> None:
    assert error.__doc__
    assert error.__doc__ != (error.__base__.__doc__ if error.__base__ else None)
    assert error.__name__.endswith("Error")


@pytest.mark.parametrize("error", TREE)
def test_message_is_kept_as_it_is(error: type[SlipstreamError]) -> None:
    assert str(error("replay.capacity 1 is below 2; raise it")) == "replay.capacity 1 is below 2; raise it"


def test_wrong_recipe_or_output_dir_is_wrong_usage() -> None:
    assert issubclass(RecipeError, UsageError)
    assert issubclass(OutputDirError, UsageError)


def test_what_a_later_try_may_cure_is_unavailable() -> None:
    unavailable = {error for error in TREE if error.status == "UNAVAILABLE"}
    assert unavailable == {
        *(ClusterError, PausedError, TargetUnavailableError, ReplayUnavailableError, PartDiedError, NotBegunError),
    }
    assert issubclass(TargetUnavailableError, TargetError)
    assert issubclass(ReplayUnavailableError, ReplayError)
