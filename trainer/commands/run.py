"""`slipstream demo` and `slipstream run`: a training job from the command line."""

from __future__ import annotations

import json
import shlex
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from trainer.commands.options import OUTPUT_DIR_HELP, STARTED_S, JsonOption, OverridesArgument, fail

if TYPE_CHECKING:
    from trainer.console import RunConsole
    from trainer.recipe import Recipe

NoDashboardOption = Annotated[
    bool, typer.Option("--no-dashboard", help="Show progress in the terminal only; serve no page.")
]

DEMO_SETTINGS: dict[str, dict[str, Any]] = {
    "dflash": {
        "drafter.loss_decay_gamma": 2.0,
        "drafter.num_anchors": 48,
        "trainer.learning_rate": 6e-3,
        "trainer.max_steps": 3200,
    },
    "eagle3": {
        "drafter.num_draft_layers": 1,
        "drafter.ttt_length": 5,
        "trainer.learning_rate": 3e-3,
        "trainer.max_steps": 1500,
    },
}
"""Where a drafter learns best with other settings than those of the demo's recipe."""


def demo(
    overrides: OverridesArgument = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Optimizer steps; the recipe's own number by default.")
    ] = None,
    output_dir: Annotated[Path, typer.Option(help=OUTPUT_DIR_HELP)] = Path("slipstream-demo"),
    drafter: Annotated[str | None, typer.Option(help="Which drafter to train: dspark, dflash or eagle3.")] = None,
    no_dashboard: NoDashboardOption = False,
    as_json: JsonOption = False,
) -> None:
    """Run the main job here and now: a tiny target, a local Ray, an embedded Redis. No GPU, no download.

    Distils a drafter for a 2.4 M-parameter model of Python's standard library in a few minutes and shows how many
    tokens a target forward yields before and after. Stop it at any time; the same command goes on where it stopped.
    """
    package_data = Path(__file__).parents[1] / "demo"
    options: dict[str, Any] = {
        "target.model": str(package_data / "target"),
        "output_dir": str(output_dir),
        "trainer.max_steps": steps,
        "drafter.algorithm": drafter,
    }
    given = {key: value for key, value in options.items() if value is not None}
    options = DEMO_SETTINGS.get(drafter or "", {}) | given
    recipe = package_data / "recipe.yaml"
    _run(recipe, overrides or [], options, as_json=as_json, local_ray=True, dashboard=not no_dashboard)


def run(
    recipe: Annotated[
        Path, typer.Argument(help="Recipe file (YAML); infra/recipes has one for each released drafter.")
    ],
    overrides: OverridesArgument = None,
    output_dir: Annotated[Path | None, typer.Option(help=OUTPUT_DIR_HELP)] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check and print the resolved recipe; start nothing.")
    ] = False,
    no_dashboard: NoDashboardOption = False,
    as_json: JsonOption = False,
) -> None:
    """Train a drafter as RECIPE says, on the running Ray cluster, or on a local Ray if there is none.

    Resumes when the output directory holds the run already.

    Example: slipstream run infra/recipes/dspark_qwen3_4b.yaml prompts.source=my.jsonl target.replicas=2
    """
    options = {"output_dir": str(output_dir) if output_dir else None}
    _run(recipe, overrides or [], options, as_json=as_json, dry_run=dry_run, dashboard=not no_dashboard)


def _run(
    path: Path,
    overrides: list[str],
    options: dict[str, Any],
    *,
    as_json: bool,
    dashboard: bool,
    local_ray: bool = False,
    dry_run: bool = False,
) -> None:
    """Run a recipe. `options` that are None were not given; where both are, an override wins."""
    from services.errors import SlipstreamError, StoppedError
    from services.replay.urls import PASSWORD_VARIABLE, hide_passwords
    from trainer.console import RunConsole, summary_table
    from trainer.recipe import load_recipe

    console = RunConsole(to_stderr=as_json)
    try:
        recipe = load_recipe(path, overrides, {key: value for key, value in options.items() if value is not None})
        if hide_passwords(overrides) != overrides:
            console.say(
                "everyone on this machine can read the password on this command line, for instance with ps: give it "
                f"in the environment variable {PASSWORD_VARIABLE} instead"
            )
        if dry_run:
            _show_plan(recipe, console, as_json=as_json)
            return
        from trainer.job import run_job  # imports Ray
        from trainer.ray_job import adapt_to_ray_job

        recipe = adapt_to_ray_job(recipe, console.say)
        _stop_on_sigterm()
        with console:
            summary = run_job(recipe, console, local_ray=local_ray, started_s=STARTED_S, dashboard=dashboard)
    except StoppedError as error:
        fail(console, f"{error}; {_how_to_go_on()}", error.exit_code)
    except SlipstreamError as error:
        fail(console, str(error), error.exit_code)
    except KeyboardInterrupt:
        fail(console, f"stopped; {_how_to_go_on()}", 1)
    if as_json:
        print(summary.model_dump_json())
    else:
        console.say(summary_table(summary))
        console.say(_next_steps(summary.checkpoint, summary.output_dir))
    if not summary.ledger.balanced:
        problems = "; ".join(summary.ledger.problems)
        fail(console, f"the ledger of {summary.output_dir} does not balance: {problems}", 1)
    if summary.lossless is False:
        fail(console, "greedy output with the drafter differs from the target's own: decoding is not lossless", 1)


def _show_plan(recipe: Recipe, console: RunConsole, *, as_json: bool) -> None:
    """What a run of this recipe would do, without starting anything."""
    import yaml

    from trainer.preparation import prepare
    from trainer.summary import format_bytes

    prepared = prepare(recipe)
    resolved = prepared.recipe.model_dump(mode="json")
    row_bytes = prepared.signature.sample_bytes(1, 1)
    if as_json:
        figures = {"bytes_per_token": row_bytes, "needed_buffer_bytes": prepared.needed_buffer_bytes}
        print(json.dumps({"recipe": resolved, **figures}))
        return
    console.say(yaml.safe_dump(resolved, sort_keys=False).rstrip())
    console.say(
        f"\ntarget: {prepared.shape.num_layers} layers of width {prepared.shape.hidden_size}, "
        f"vocabulary {prepared.shape.vocab_size}, fingerprint {prepared.shape.fingerprint}"
    )
    console.say(
        f"features: {format_bytes(row_bytes)} a token, layers {list(prepared.signature.layer_ids)} and the last"
    )
    console.say(
        f"buffer: {format_bytes(recipe.replay.capacity)}, at least {format_bytes(prepared.needed_buffer_bytes)} needed"
    )


def _next_steps(checkpoint: str, output_dir: str) -> str:
    return (
        f"\nThe drafter is a Hugging Face folder: load it with drafters.load_drafter({checkpoint!r}).\n"
        f"Train longer: the same command with more steps goes on from here. Start anew: remove {output_dir}.\n"
        "Your own target and prompts: slipstream run infra/recipes/dspark_qwen3_4b.yaml prompts.source=your.jsonl"
    )


def _how_to_go_on() -> str:
    from services.replay.urls import hide_passwords

    command = shlex.join(["slipstream", *hide_passwords(sys.argv[1:])])
    return f"to go on from the last checkpoint run the same command again:\n  {command}"


def _stop_on_sigterm() -> None:
    """Let SIGTERM end a run the way Ctrl-C does."""

    def interrupt(number: int, frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
