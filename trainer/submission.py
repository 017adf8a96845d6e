"""A run as a job of a Ray cluster: checked, uploaded, followed to its end. A thin layer over Ray's own job client."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import aiohttp
import ray
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

from services.errors import ClusterError, RecipeError, UsageError
from services.reading import read_json
from services.replay.urls import PASSWORD_VARIABLE, hide_passwords
from trainer.ray_job import STOP_WAIT_S, STOP_WAIT_VARIABLE
from trainer.recipe import load_recipe

ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
"""Where Ray's client looks for an address, even if it is given one."""

POLL_S = 1.0
"""How often the job's status is asked where its log does not stream."""

TAIL_S = 600.0
"""How long one stream of the log is followed: a connection that broke without a word is made anew then."""

AWAY_DEADLINE_S = 60.0
"""How long the job server may be away before following a job is given up."""


def check_recipe(path: Path, overrides: Sequence[str], working_dir: Path) -> Path:
    """Check what can be checked before anything is uploaded.

    Args:
        path: The recipe, relative to the current directory.
        overrides: `section.key=value`.
        working_dir: The folder that is uploaded.

    Returns:
        The recipe's path inside the working directory.

    Raises:
        UsageError: There is no such folder, or an override holds a password.
        RecipeError: The recipe is missing or wrong.
    """
    if hide_passwords(overrides) != list(overrides):
        raise UsageError(
            "an override holds a password: as part of a job's command line everyone on the cluster could read it. "
            f"Give the URL without it, and the password in {PASSWORD_VARIABLE} in the environment of the cluster's "
            "head node or container"
        )
    folder = working_dir.expanduser().resolve()
    if not folder.is_dir():
        raise UsageError(f"--working-dir {working_dir} is no folder")
    load_recipe(path, overrides)
    # Not resolved: a recipe may be a link, and is read by its name in the job.
    inside = Path(os.path.normpath(Path.cwd() / path.expanduser()))
    if not inside.is_relative_to(folder):
        raise RecipeError(
            f"recipe {path} is outside --working-dir {folder}, and only that is uploaded: move it there or name "
            "another --working-dir"
        )
    return inside.relative_to(folder)


@dataclass(frozen=True)
class JobResult:
    """How a job ended.

    Attributes:
        status: Ray's word: SUCCEEDED, FAILED or STOPPED.
        message: Why Ray could not run the command, else empty: then the log says what happened.
        exit_code: What the command that follows the job ends with: that of the run, or 1.
    """

    status: str
    message: str
    exit_code: int


class Submission:
    """A job that was sent to a cluster; make one with `send`."""

    def __init__(self, client: JobSubmissionClient, job_id: str) -> None:
        self.job_id = job_id
        self._client = client
        self._num_shown = 0

    @classmethod
    def send(
        cls,
        recipe: Path,
        overrides: Sequence[str],
        *,
        address: str | None,
        working_dir: Path,
        output_dir: Path | None,
        submission_id: str | None,
        as_json: bool,
        say: Callable[[str], None],
    ) -> Self:
        """Upload the working directory and start the job.

        Args:
            recipe: Path inside the working directory.
            overrides: `section.key=value`.
            address: The job server's, or None for the one that Ray's environment variables or this machine name.
            working_dir: What to upload.
            output_dir: On the cluster; None leaves the recipe's.
            submission_id: The job's id; None lets Ray choose.
            as_json: Let the run end its log with its summary as one JSON object.
            say: Hears what is going on.

        Raises:
            ClusterError: No cluster answers there, it refuses the token, runs another Ray, or refuses the job.
        """
        client = connect(address)
        say(f"uploading {working_dir.resolve()} to {client.get_address()}")
        command = ["python", "-m", "trainer", "run", str(recipe), *overrides]
        if output_dir is not None:
            command += ["--output-dir", str(output_dir)]
        if as_json:
            command.append("--json")
        try:
            job_id = client.submit_job(
                entrypoint=shlex.join(command),
                submission_id=submission_id,
                runtime_env={"working_dir": str(working_dir.resolve()), "env_vars": job_environment()},
            )
        except (OSError, RuntimeError, ValueError) as error:
            raise ClusterError(f"the cluster at {client.get_address()} did not take the job: {error}") from error
        submission = cls(client, job_id)
        say(f"job {job_id}; stop it with: {submission.stop_command}")
        return submission

    @property
    def address(self) -> str:
        """The job server's."""
        address: str = self._client.get_address()
        return address

    @property
    def stop_command(self) -> str:
        """What a user types to stop the job in order."""
        return f"ray job stop --address {self.address} {self.job_id}"

    def follow(self, show: Callable[[str], None]) -> None:
        """Show the job's log until the job has ended, also when the connection is lost in between.

        Args:
            show: Takes the next piece of the log.

        Raises:
            ClusterError: The job server stays away for a minute.
        """
        last_heard_s = time.monotonic()
        while True:
            num_shown = self._num_shown
            try:
                asyncio.run(self._tail(show))
                if self._status().is_terminal():
                    return
                last_heard_s = time.monotonic()
            except (RuntimeError, OSError, aiohttp.ClientError) as error:
                if self._num_shown > num_shown:
                    last_heard_s = time.monotonic()
                if time.monotonic() > last_heard_s + AWAY_DEADLINE_S:
                    raise self._went_away(error) from error
            time.sleep(POLL_S)

    def result(self) -> JobResult:
        """How the job ended; call it after `follow`.

        Raises:
            ClusterError: The job server went away.
        """
        with self._reaching():
            details = self._client.get_job_info(self.job_id)
        status = JobStatus(details.status)
        if status is JobStatus.SUCCEEDED:
            return JobResult(status.value, "", 0)
        if status is JobStatus.FAILED and not details.driver_exit_code:
            return JobResult(status.value, details.message or "Ray does not say why", 1)
        return JobResult(status.value, "", details.driver_exit_code or 1)

    def as_json(self) -> dict[str, Any]:
        """One object for scripts: the job, its status, and the run's own summary where it got that far.

        Raises:
            ClusterError: The job server went away.
        """
        with self._reaching():
            status = self._status()
            summary = last_json_line(self._client.get_job_logs(self.job_id)) if status.is_terminal() else None
        return {
            "job_id": self.job_id,
            "address": self.address,
            "status": status.value,
            "summary": summary,
        }

    @contextlib.contextmanager
    def _reaching(self) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, OSError) as error:
            raise self._went_away(error) from error

    def _went_away(self, error: Exception) -> ClusterError:
        return ClusterError(
            f"the job server at {self.address} went away ({error}); whether job {self.job_id} still runs, "
            f"ray job status {self.job_id} can say when it is back"
        )

    async def _tail(self, show: Callable[[str], None]) -> None:
        """Show what of the log has not been shown; the server sends all of it, from its beginning."""
        position = 0
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(TAIL_S):
                async for text in self._client.tail_job_logs(self.job_id):
                    position += len(text)
                    if position > self._num_shown:
                        show(text[max(0, len(text) - (position - self._num_shown)) :])
                        self._num_shown = position

    def _status(self) -> JobStatus:
        return JobStatus(self._client.get_job_status(self.job_id))


def connect(address: str | None) -> JobSubmissionClient:
    """A client of a cluster's job server that has been reached with the right token and runs the same Ray.

    Args:
        address: Such as http://head:8265. None leaves it to RAY_API_SERVER_ADDRESS, RAY_ADDRESS, or the cluster of this
            machine.

    Raises:
        ClusterError: Nothing answers there, the token is missing or wrong, or Ray is another version.
    """
    for name in ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk", "ray._private.runtime_env"):
        logging.getLogger(name).setLevel(logging.WARNING)
    if address is not None:
        for name in ADDRESS_VARIABLES:
            os.environ.pop(name, None)  # Ray would prefer them to the address that the user just gave
    where = address or next(filter(None, map(os.environ.get, ADDRESS_VARIABLES)), "this machine")
    try:
        client = JobSubmissionClient(address)
    except AuthenticationError as error:
        raise ClusterError(
            f"the cluster at {where} refuses the token: {error.message.splitlines()[0]}. Set RAY_AUTH_MODE=token, and "
            "RAY_AUTH_TOKEN_PATH to the file that holds the cluster's token"
        ) from error
    except (OSError, RuntimeError, ValueError) as error:
        raise ClusterError(
            f"no Ray job server at {where}: {error} Give its address, such as --address http://head:8265, or start "
            "a cluster: RAY_AUTH_MODE=token ray start --head"
        ) from error
    there = client._server_ray_version  # Ray asks for it, and tells nobody
    if there != ray.__version__:
        raise ClusterError(
            f"the cluster at {where} runs Ray {there}, here is Ray {ray.__version__}: install ray=={there} here, or "
            f"ray=={ray.__version__} on the cluster"
        )
    return client


def job_environment() -> dict[str, str]:
    """Environment variables of the job: where its Python is, and how long a stop may take.

    The interpreter of this command comes first where the nodes have it too, as on this machine or in one image;
    elsewhere the nodes' own PATH decides.
    """
    return {"PATH": f"{Path(sys.executable).parent}:${{PATH}}", STOP_WAIT_VARIABLE: str(STOP_WAIT_S)}


def last_json_line(log: str) -> dict[str, Any] | None:
    """The object that the last line of a log is, if it is one."""
    lines = log.rstrip().splitlines()
    if not lines or not lines[-1].startswith("{"):
        return None
    try:
        last: dict[str, Any] = read_json(lines[-1])
    except ValueError:  # a line of something else
        return None
    return last
