"""Steering a run from its dashboard: the same requests as from the command line."""

from __future__ import annotations

from typing import Annotated, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field

MOST_TARGETS = 4096
"""More than any cluster has: a slip of the keyboard."""


class Request(BaseModel):
    """What a page asks for."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    request_id: Annotated[str, Field(min_length=1, max_length=64)]
    """Made by the page; the same request twice is carried out once."""


class Scale(Request):
    """Have so many targets."""

    action: Literal["scale"]
    targets: int = Field(ge=0, le=MOST_TARGETS)


class Steer(Request):
    """Pause, go on, or end after this step."""

    action: Literal["pause", "continue", "stop"]


Action = Annotated[Scale | Steer, Field(discriminator="action")]


class Controls(Protocol):
    """Carries actions out; called in a thread of its own, one at a time."""

    def act(self, run_id: str, action: Scale | Steer) -> str:
        """Carry an action out.

        Returns:
            What happens now, in words.

        Raises:
            SlipstreamError: It cannot be done.
        """
        ...
