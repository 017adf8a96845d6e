"""What is wrong with a record that was read back from a file, in one line."""

from __future__ import annotations

import json
from typing import Any

from pydantic import ValidationError

LONGEST = 200
"""Characters of a file's content, or of a library's words, that a message repeats."""


def read_json(text: str | bytes) -> Any:
    """The value of a JSON text, however deep.

    Raises:
        ValueError: It is no JSON; the message is one line.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: {error.reason} at byte {error.start}") from error


def first_fault(error: ValueError) -> str:
    """The first thing that is wrong: where a record has a fault its field is named."""
    if not isinstance(error, ValidationError):
        return str(error)[:LONGEST]
    fault = error.errors(include_url=False, include_input=False, include_context=False)[0]
    place = ".".join(map(str, fault["loc"]))[:LONGEST]
    return f"{place}: {fault['msg']}"[: 2 * LONGEST] if place else fault["msg"][:LONGEST]
