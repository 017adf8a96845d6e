"""The Lua scripts: one file, one atomic transition."""

from __future__ import annotations

from functools import cache
from importlib.resources import files

import redis
from redis.commands.core import Script

from services.errors import TableLostError

Reply = list[bytes]
"""What follows the first word of a script's reply."""


@cache
def _source(name: str) -> str:
    folder = files("services.replay")
    return folder.joinpath("common.lua").read_text("utf-8") + folder.joinpath(f"{name}.lua").read_text("utf-8")


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
            self._scripts[name] = self._client.register_script(_source(name))
        word, *rest = self._scripts[name](keys=[self._prefix], args=arguments)
        status = word.decode()
        if status == "LOST":
            raise TableLostError(
                f"there is no replay table under the prefix {self._prefix!r}: it was never created, or Redis restarted "
                "empty. Run the same command again: it continues from the last checkpoint."
            )
        return status, rest
