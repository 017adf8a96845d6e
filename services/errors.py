"""Every error a user can meet, and the gRPC status each travels as.

A message names the thing, the value, the bound and the way out. `SlipstreamError` is what the command line prints
without a traceback; anything else is a defect and keeps its traceback.
"""

from __future__ import annotations

from typing import ClassVar


class SlipstreamError(Exception):
    """Base of all errors that a user can act on.

    Attributes:
        exit_code: What the command line exits with: 1 failed, 2 wrong usage.
        status: Name of the gRPC status that carries this error over the wire.
    """

    exit_code: ClassVar[int] = 1
    status: ClassVar[str] = "INTERNAL"


class UsageError(SlipstreamError):
    """The command or recipe is wrong; nothing was started."""

    exit_code = 2
    status = "INVALID_ARGUMENT"


class RecipeError(UsageError):
    """A recipe has an unknown key, a wrong value, or settings that cannot work together."""


class OutputDirError(UsageError):
    """The output directory belongs to another run, or another driver is using it."""

    status = "FAILED_PRECONDITION"


class PromptError(SlipstreamError):
    """A prompt source is missing or holds lines that are no conversations."""

    status = "INVALID_ARGUMENT"


class CheckpointError(SlipstreamError):
    """A checkpoint is missing, cut short, or of another run or model."""

    status = "FAILED_PRECONDITION"


class ClusterError(SlipstreamError):
    """A Ray cluster does not answer, refuses the token, or runs another version of Ray."""

    status = "UNAVAILABLE"


class PlacementError(SlipstreamError):
    """An actor could not be placed: the cluster lacks a resource that the recipe asks for."""

    status = "RESOURCE_EXHAUSTED"


class TargetError(SlipstreamError):
    """A target could not be loaded, or answered with something else than it promised."""


class CaptureRequestError(TargetError):
    """A Capture request asks for something this target cannot give (layers, rows, tokens out of range)."""

    status = "INVALID_ARGUMENT"


class TargetUnavailableError(TargetError):
    """A target does not answer; another one or a later try may succeed."""

    status = "UNAVAILABLE"


class TargetAccessError(TargetUnavailableError):
    """A target and its caller do not agree on token or TLS."""

    status = "UNAUTHENTICATED"


class TargetBusyError(TargetUnavailableError):
    """A target serves as many captures as it can; it is well, and will take this one later."""

    status = "RESOURCE_EXHAUSTED"


class TargetStalledError(TargetUnavailableError):
    """A target took a call and gave nothing for too long."""

    status = "DEADLINE_EXCEEDED"


class WireError(SlipstreamError):
    """Bytes do not say what their header promises: shape, dtype, length or checksum differ."""

    status = "DATA_LOSS"


class FeatureError(SlipstreamError):
    """Captured features are not finite."""

    status = "DATA_LOSS"


class ReplayError(SlipstreamError):
    """The replay buffer refuses an operation."""

    status = "FAILED_PRECONDITION"


class ReplayUnavailableError(ReplayError):
    """Redis does not answer."""

    status = "UNAVAILABLE"


class ReplayRequestError(ReplayError):
    """A message to the replay service asks for what cannot be, or is none."""

    status = "INVALID_ARGUMENT"


class ReplayAccessError(ReplayUnavailableError):
    """A replay service and its caller do not agree on token or TLS."""

    status = "UNAUTHENTICATED"


class ReplayBusyError(ReplayUnavailableError):
    """A replay service has as many calls at once as it takes; it is well, and will take this one later."""

    status = "RESOURCE_EXHAUSTED"


class TableLostError(ReplayError):
    """The table is not in Redis: it was never created there, or Redis restarted empty."""


class SampleTooLargeError(ReplayError):
    """One sample needs more bytes than the whole buffer holds."""

    status = "RESOURCE_EXHAUSTED"


class SignatureError(ReplayError):
    """A sample's target, layers, width or dtype differ from the table's."""


class StaleGenerationError(ReplayError):
    """A lease or ack comes from a trainer group that has been replaced."""


class UnknownSampleError(ReplayError):
    """A sample id is not, or no longer, in the table."""

    status = "NOT_FOUND"


class PausedError(SlipstreamError):
    """The run is paused: no further step is granted until it continues."""

    status = "UNAVAILABLE"


class StoppedError(SlipstreamError):
    """The run was asked to stop and has ended in order; it can be resumed."""

    status = "CANCELLED"


class PartDiedError(SlipstreamError):
    """A part of the run has lost its process."""

    status = "UNAVAILABLE"


class NotBegunError(SlipstreamError, AttributeError):
    """A part's process has been started again and is not set up yet: ask again."""

    status = "UNAVAILABLE"


class DeadlineError(SlipstreamError):
    """Something did not happen in time; the message says what was waited for."""

    status = "DEADLINE_EXCEEDED"
