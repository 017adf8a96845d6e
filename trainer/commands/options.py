"""What several commands share: option types, and how a command fails. Nothing heavy is imported here."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn

import typer

if TYPE_CHECKING:
    from trainer.console import RunConsole

STARTED_S = time.time()
"""Wall-clock time at which the command began."""

OUTPUT_DIR_HELP = "Where checkpoints, ledger and telemetry go; a run that is there is resumed."

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, everything else on stderr.")]

OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(metavar="SECTION.KEY=VALUE", help="Settings that replace the recipe's: trainer.max_steps=100."),
]


def fail(console: RunConsole, message: str, exit_code: int) -> NoReturn:
    """Say what went wrong and end the command."""
    console.error(message)
    raise typer.Exit(exit_code)


def choose_device(wanted: Literal["auto", "cpu", "cuda"]) -> Literal["cpu", "cuda"]:
    """What to decode on in this process: auto takes a GPU where there is one.

    Raises:
        UsageError: A GPU is wanted and there is none.
    """
    if wanted == "cpu":
        return wanted
    import torch

    if torch.cuda.is_available():
        return "cuda"
    if wanted == "cuda":
        from services.errors import UsageError

        raise UsageError("--device cuda: this machine has no GPU that torch can use; give --device cpu")
    return "cpu"


def hardware_of(device: Literal["cpu", "cuda"]) -> str:
    """What this process decodes on, to be written beside its times."""
    from evaluation.bench.hardware import describe_hardware

    if device == "cpu":
        return describe_hardware()
    import torch

    return f"{torch.cuda.get_device_name()}, {describe_hardware()}"
