"""The Lua scripts: one file, one atomic transition."""

from __future__ import annotations

from functools import cache
from importlib.resources import files

import redis
from redis.commands.core import Script

from services.replay.refusals import table_lost

SHARED = ("common", "rate_limiter", "selectors")
"""What each script begins with."""

Reply = list[bytes]
"""What follows the first word of a script's reply."""


@cache
def source(name: str) -> str:
    """What Redis runs as `<name>.lua`."""
    folder = files("services.replay")
    return "".join(folder.joinpath(f"{part}.lua").read_text("utf-8") for part in (*SHARED, name))


class Scripts:
    """Runs scripts under one prefix; a Redis that restarted gets them again by itself."""

    def __init__(self, client: redis.Redis, prefix: str) -> None:
        self._client = client
        self._prefix = prefix
        self._scripts: dict[str, Script] = {}

    def run(self, name: str, *arguments: str | int | float | bytes) -> tuple[str, Reply]:
        """Run `<name>.lua`.

        Returns:
            The first word of the reply, and the rest of it.

        Raises:
            TableLostError: The script needs a table and there is none under this prefix.
        """
        if name not in self._scripts:
            self._scripts[name] = self._client.register_script(source(name))
        word, *rest = self._scripts[name](keys=[self._prefix], args=arguments)
        status = word.decode()
        if status == "LOST":
            raise table_lost(self._prefix)
        return status, rest
