"""Logs of a run: one file of JSON lines for each of its processes, `<output_dir>/logs/<role>[-<index>].jsonl`.

Each line has `time` (ISO 8601, UTC), `level`, `run`, `role`, `rank` (which one of several alike, else null), `step` (of
trainer ranks), `logger` and `message`; an exception adds `traceback`. Code logs through the standard library as usual:
`logging.getLogger(__name__)`.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pythonjsonlogger.json import JsonFormatter

from services.contracts import Record
from services.errors import DeadlineError, SlipstreamError

OUR_LOGGERS = ("drafters", "evaluation", "services", "trainer")
"""These log from INFO on; libraries from WARNING on, as the root logger does."""

logger = logging.getLogger(__name__)


class LogPlace(Record):
    """Where the process of one part of a run logs to, and what stands on each of its lines."""

    folder: str
    """The run's `logs` folder; on a node that does not see it, a local one of that name."""
    run: str
    """Id of the run."""
    role: str
    """driver, coordinator, shard, trainer, target or evaluator."""
    rank: int | None = None
    """Which one, of those that there may be several of."""

    @property
    def path(self) -> Path:
        """The file."""
        return Path(self.folder) / (f"{self.role}.jsonl" if self.rank is None else f"{self.role}-{self.rank}.jsonl")


class RunLog(logging.FileHandler):
    """Writes the lines of one process; made by `start_logging`.

    Args:
        place: Where to, and what every line says.
    """

    def __init__(self, place: LogPlace) -> None:
        place.path.parent.mkdir(parents=True, exist_ok=True)
        super().__init__(place.path, encoding="utf-8")
        self.step: int | None = None
        self.setLevel(logging.INFO)
        self.setFormatter(
            JsonFormatter(
                ["time", "levelname", "run", "role", "rank", "step", "name", "message"],
                rename_fields={"levelname": "level", "name": "logger", "exc_info": "traceback"},
                static_fields={"run": place.run, "role": place.role, "rank": place.rank},
                timestamp="time",
                json_ensure_ascii=False,
            )
        )

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line."""
        record.step = self.step
        super().emit(record)


def start_logging(place: LogPlace) -> RunLog:
    """Let this process log to its file, what ends a thread or the process included; an earlier such file is closed.

    Raises:
        OSError: The file cannot be written.
    """
    stop_logging()
    run_log = RunLog(place)
    logging.getLogger().addHandler(run_log)
    for name in OUR_LOGGERS:
        logging.getLogger(name).setLevel(logging.INFO)
    threading.excepthook = _log_thread_failure
    return run_log


def stop_logging() -> None:
    """Close this process' file, if it has one."""
    threading.excepthook = threading.__excepthook__
    for run_log in _run_logs():
        logging.getLogger().removeHandler(run_log)
        run_log.close()


@contextlib.contextmanager
def process_log(place: LogPlace) -> Iterator[None]:
    """This process logs to its file while the context lasts, and what it dies of unless a user can act on that."""
    start_logging(place)
    try:
        yield
    except Exception as error:
        if not isinstance(error, SlipstreamError):
            logger.exception("the run failed")
        raise
    finally:
        stop_logging()


def set_step(step: int) -> None:
    """The step that lines from now on belong to."""
    for run_log in _run_logs():
        run_log.step = step


class EventLog:
    """The sink that puts a run's events, evaluations, start and end into the driver's log."""

    def take(self, record: dict[str, Any]) -> None:
        """Log a record that says what happened; figures are for other sinks."""
        match record["kind"]:
            case "step":
                set_step(record["step"])
            case "run":
                logger.info("attempt %d of run %s: %s", record["attempt"], record["run_id"], record["command"])
            case "event":
                logger.warning("%s: %s", record["event"], record["message"])
            case "evaluation":
                logger.info("decoded accepted length of %s: %.3f", record["label"], record["accepted_length"])
            case "end":
                level = logging.ERROR if record["outcome"] == "failed" else logging.INFO
                logger.log(level, "%s%s", record["outcome"], f": {record['message']}" if record["message"] else "")

    def close(self) -> None:
        """Nothing: the log belongs to the process."""


def logged(cls: type, place: LogPlace) -> type:
    """The class of an actor, so that its process logs to `place` from its constructor on, whatever a call raises too.

    An error that the caller can act on is a line; a defect comes with its traceback. A deadline that has passed is how
    callers are asked to come again, and no line.
    """

    def begin(self: Any, *args: Any, **options: Any) -> None:
        try:
            start_logging(place)
        except OSError as error:  # a node without the run's storage can still do its work; Ray keeps its stderr
            sys.stderr.write(f"no log in {place.path}: {error}\n")
        cls.__init__(self, *args, **options)  # type: ignore[misc]  # that very one

    functions = {
        name: _log_failures(function)
        for name, function in inspect.getmembers(cls, inspect.isfunction)
        if not name.startswith("_")
    }
    return type(cls.__name__, (cls,), {"__init__": _log_failures(begin), "__doc__": cls.__doc__, **functions})


def _log_failures(function: Callable[..., Any]) -> Callable[..., Any]:
    log = logging.getLogger(function.__module__)

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        try:
            return function(*args, **options)
        except DeadlineError:
            raise
        except SlipstreamError as error:
            log.error("%s: %s: %s", function.__name__, type(error).__name__, error)
            raise
        except Exception:
            log.exception("%s failed", function.__name__)
            raise

    return call


def _log_thread_failure(failure: threading.ExceptHookArgs) -> None:
    if failure.exc_value is not None and failure.exc_type is not SystemExit:
        error = (failure.exc_type, failure.exc_value, failure.exc_traceback)
        logger.error("thread %s failed", failure.thread.name if failure.thread else "?", exc_info=error)
    threading.__excepthook__(failure)


def _run_logs() -> list[RunLog]:
    return [handler for handler in logging.getLogger().handlers if isinstance(handler, RunLog)]
