"""`slipstream submit`: `slipstream run` on a cluster, by Ray's job client."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from trainer.commands.options import JsonOption, OverridesArgument, fail


def submit(
    recipe: Annotated[Path, typer.Argument(help="Recipe file (YAML) inside the working directory.")],
    overrides: OverridesArgument = None,
    address: Annotated[
        str | None,
        typer.Option(help="Where the cluster's job server is, like http://head:8265; RAY_ADDRESS by default."),
    ] = None,
    working_dir: Annotated[
        Path, typer.Option(help="Folder to upload, without what its .gitignore names; the job runs in a copy.")
    ] = Path(),
    output_dir: Annotated[
        Path | None, typer.Option(help="Absolute path on the cluster, on storage that every node of the run sees.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Id of the job in Ray; Ray makes one up by default.")] = None,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Do not wait for the job.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Run a recipe as a job of a Ray cluster: upload this folder, show the job's log, end as the job ends.

    The same submission again goes on with the run in the same output directory.

    Example: slipstream submit infra/recipes/demo.yaml --address http://head:8265 --output-dir /data/runs/demo
    """
    from services.errors import SlipstreamError
    from trainer.console import RunConsole
    from trainer.submission import Submission, check_recipe

    console = RunConsole(to_stderr=as_json)
    try:
        inside = check_recipe(recipe, overrides or [], working_dir)
        submission = Submission.send(
            inside,
            overrides or [],
            address=address,
            working_dir=working_dir,
            output_dir=output_dir,
            submission_id=name,
            as_json=as_json,
            say=console.say,
        )
        if no_wait:
            if as_json:
                print(json.dumps(submission.as_json()))
            return
        try:
            submission.follow(lambda text: console.console.print(text, end="", markup=False, soft_wrap=True))
        except KeyboardInterrupt:
            fail(console, f"job {submission.job_id} runs on; stop it with: {submission.stop_command}", 1)
        result = submission.result()
    except SlipstreamError as error:
        fail(console, str(error), error.exit_code)
    except KeyboardInterrupt:
        fail(console, "interrupted; ray job list shows whether the job had been submitted", 1)
    if as_json:
        print(json.dumps(submission.as_json()))
    else:
        console.say(f"job {submission.job_id} {result.status.lower()}")
    if result.exit_code:
        if result.message:
            fail(console, result.message, result.exit_code)
        raise typer.Exit(result.exit_code)
