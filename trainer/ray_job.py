"""What is different where the command is the entry point of a Ray job: `ray job submit … -- slipstream run …`.

Ray unpacks the uploaded working directory under a name made from its content, and deletes it some time after the job.
Nothing of a run may therefore lie in it, or be known by its path there.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from services.errors import OutputDirError
from trainer.recipe import PATH_KEYS, Recipe

JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Set by Ray in the environment of a job's entry point, and nowhere else."""

UNPACKED = "working_dir_files"
"""Folder of a Ray session below which the working directories of its jobs are unpacked."""

STOP_WAIT_VARIABLE = "RAY_JOB_STOP_WAIT_TIME_S"
RAY_STOP_WAIT_S = 3
"""Seconds that `ray job stop` leaves a job by default before it kills it."""

STOP_WAIT_S = 270
"""Enough for the longest orderly stop: three minutes for the step and its checkpoint, and the end of every part."""


def is_ray_job() -> bool:
    """Whether this process is the entry point of a Ray job."""
    return JOB_VARIABLE in os.environ


def adapt_to_ray_job(recipe: Recipe, say: Callable[[str], None]) -> Recipe:
    """The recipe with paths that outlive the job; outside a Ray job the recipe as it is.

    Args:
        recipe: As the command line resolved it.
        say: Hears where the output goes if that is not where the recipe says, and how long a stop may take.

    Raises:
        OutputDirError: The output directory was put inside the job's working directory on purpose.
    """
    if not is_ray_job():
        return recipe
    cwd = Path.cwd()
    output_dir = lasting_output_dir(recipe.output_dir, cwd=cwd, home=Path.home())
    if output_dir != recipe.output_dir:
        say(f"output_dir is {output_dir}: a job's working directory is temporary. Elsewhere: --output-dir /absolute")
    if int(os.environ.get(STOP_WAIT_VARIABLE, RAY_STOP_WAIT_S)) < STOP_WAIT_S:
        say(
            f"a stop kills this job {os.environ.get(STOP_WAIT_VARIABLE, RAY_STOP_WAIT_S)} s after it asks, perhaps "
            f"before the last checkpoint is written; slipstream submit, or {STOP_WAIT_VARIABLE}={STOP_WAIT_S} in the "
            "job's runtime environment, gives it time"
        )
    return relative_to_working_dir(recipe, cwd).model_copy(update={"output_dir": output_dir})


def lasting_output_dir(output_dir: Path, *, cwd: Path, home: Path) -> Path:
    """Where a job's output goes: a relative directory that would be deleted with the job is relative to home instead.

    The same submission finds the same directory again, so it goes on with the run.

    Raises:
        OutputDirError: It is an absolute path inside the job's working directory.
    """
    wanted = output_dir.expanduser()
    resolved = Path(os.path.normpath(cwd / wanted))
    if UNPACKED not in resolved.parts:
        return output_dir
    if wanted.is_absolute() or not resolved.is_relative_to(cwd):
        raise OutputDirError(
            f"output_dir {output_dir} is inside the job's working directory, which Ray deletes after the job; "
            "choose another --output-dir"
        )
    return home / resolved.relative_to(cwd)


def relative_to_working_dir(recipe: Recipe, cwd: Path) -> Recipe:
    """The recipe with its files in the working directory named relative to it.

    Every actor of the job runs in its node's own copy. The absolute name changes with every change of the code, and a
    resumed run must name the same files.
    """
    sections: dict[str, dict[str, str]] = {}
    for section, key in PATH_KEYS:
        value = getattr(getattr(recipe, section), key)
        if isinstance(value, str) and Path(value).is_absolute() and Path(value).is_relative_to(cwd):
            sections.setdefault(section, {})[key] = str(Path(value).relative_to(cwd))
    changed = {name: getattr(recipe, name).model_copy(update=values) for name, values in sections.items()}
    return recipe.model_copy(update=changed)
