"""The prompts of a task: a JSONL file of `turns`, downloaded once where it is not there yet. No torch.

Lines of `turns` are read by `services.prompts.sources`, as all prompt files are.
"""

from __future__ import annotations

import json
import os
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from evaluation.tasks import HubDataset, JsonFiles, Row, Task
from services.errors import PromptError, UsageError
from services.prompts.sources import Conversations, Message, load_conversations

TIMEOUT_S = 60.0
"""Longest silence of a web server."""


def task_file(name: str, folder: Path) -> Path:
    """Where a task's prompts lie in a folder of them."""
    return folder / f"{name}.jsonl"


def cache_folder() -> Path:
    """Where downloaded prompts are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "slipstream" / "tasks"


def find_in_folder(task: Task, folder: Path) -> Path:
    """A task's file in a folder that the user named.

    Raises:
        UsageError: It is not there.
    """
    path = task_file(task.name, folder)
    if not path.is_file():
        raise UsageError(
            f"there is no {path.name} in {folder}: put one there (JSON lines with `turns`), name other --tasks, or "
            "leave --tasks-dir out to have it downloaded"
        )
    return path


def fetch(task: Task, folder: Path, say: Callable[[str], None]) -> Path:
    """A task's file in the cache, downloaded if it is not there. It appears whole or not at all.

    Args:
        task: Which.
        folder: The cache.
        say: Hears that something is downloaded.

    Raises:
        PromptError: `datasets` is not installed, the download failed, or a row lacks a field.
    """
    path = task_file(task.name, folder)
    if path.exists():
        return path
    say(f"downloading the prompts of {task.name} from {task.source}")
    folder.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with new.open("w", encoding="utf-8") as file:
            for turns in _turns_of(task):
                file.write(json.dumps({"turns": turns}, ensure_ascii=False) + "\n")
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)
    return path


def load_turns(path: Path) -> tuple[Conversations, list[Message]]:
    """The first user turn of each line of a file of conversations.

    Raises:
        PromptError: The file is missing or empty, a line is malformed, or has no user turn.
    """
    conversations = load_conversations(str(path), split="heldout", strict=False)
    if conversations.rejected:
        raise PromptError(
            f"{conversations.rejected[0]} ({len(conversations.rejected)} such lines in all): mend them or take them "
            "out; figures over a part of a benchmark could not be compared"
        )
    first = []
    for index in range(len(conversations.items)):
        users = [message for message in conversations.items[index] if message["role"] == "user"]
        if not users:
            raise PromptError(f"{conversations.items.origin(index)}: no user turn, so there is nothing to decode")
        first.append(users[0])
    return conversations, first


def _turns_of(task: Task) -> Iterator[list[str]]:
    for number, row in enumerate(_rows(task)):
        try:
            first, *later = task.read(row)
        except (KeyError, TypeError, ValueError) as error:
            raise PromptError(
                f"row {number} of {task.source} is not what {task.name} was read from before: {error!r} (it has "
                f"{', '.join(sorted(row)[:8])}). {_ELSE}"
            ) from error
        yield [task.with_suffix(first), *later]


_ELSE = "Get the prompts elsewhere as JSON lines of `turns`, and name their folder with --tasks-dir"


def _rows(task: Task) -> Iterable[Row]:
    return _rows_of_hub(task.source) if isinstance(task.source, HubDataset) else _rows_of_files(task.source)


def _rows_of_hub(source: HubDataset) -> Iterable[Row]:
    try:
        import datasets  # an extra: whoever brings prompt files of their own needs none of it
    except ImportError as error:
        raise PromptError(
            f"downloading {source} needs the package datasets: pip install 'slipstream-distill[datasets]'. {_ELSE}"
        ) from error
    datasets.disable_progress_bars()
    try:
        rows: Iterable[Row] = datasets.load_dataset(source.path, source.config, split=source.split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise PromptError(f"cannot download {source}: {error}. {_ELSE}") from error
    return rows


def _rows_of_files(source: JsonFiles) -> Iterator[Row]:
    """Rows as the lines come in: such files may hold gigabytes of test cases beside each prompt."""
    for url in source.urls:
        try:
            with urllib.request.urlopen(url, timeout=TIMEOUT_S) as answer:
                for line in answer:
                    if line.strip():
                        yield json.loads(line)
        except (OSError, ValueError) as error:
            raise PromptError(f"cannot download {url}: {error}. {_ELSE}") from error
