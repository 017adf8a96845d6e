"""A bar that counts what is done on a terminal, and elsewhere a line every few seconds: for commands that decode."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from trainer.console import PLAIN_INTERVAL_S


class DecodingProgress:
    """A context manager; the bar is gone at its end.

    Args:
        console: Where to.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("· left"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._bar = self._progress.add_task("loading", total=None)
        self._text = ""
        self._done = 0
        self._total = 0
        self._next_line_s = 0.0

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def restart(self, num_done: int, num_in_all: int, text: str = "", *, where: str = "") -> None:
        """So much is done already, of so much.

        Args:
            num_done: If there is more to do, it is said that this goes on.
            num_in_all: With what is done.
            text: What is being done.
            where: Behind "going on", if it is to be said.
        """
        self._text, self._done, self._total = text, num_done, num_in_all
        if where and 0 < num_done < num_in_all:
            self._console.print(f"going on{where}: {num_done} of {num_in_all} records are there", soft_wrap=True)
        self._progress.reset(self._bar, total=num_in_all, completed=num_done, description=text or "decoding")

    def one_more(self, text: str | None = None) -> None:
        """One more is done.

        Args:
            text: What is shown from now on; None goes on with the text before.
        """
        self._done += 1
        self._text = self._text if text is None else text
        self._progress.update(self._bar, completed=self._done, description=self._text)
        if not self._console.is_terminal and time.monotonic() >= self._next_line_s:
            self._next_line_s = time.monotonic() + PLAIN_INTERVAL_S
            self._console.print(f"{self._done}/{self._total} · {self._text}", soft_wrap=True)
