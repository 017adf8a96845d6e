"""What several commands share: option types, and how a command fails. Nothing heavy is imported here."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn

import typer

if TYPE_CHECKING:
    from evaluation.session import TaskChoice
    from trainer.console import RunConsole

STARTED_S = time.time()
"""Wall-clock time at which the command began."""

OUTPUT_DIR_HELP = "Where checkpoints, ledger and telemetry go; a run that is there is resumed."

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, everything else on stderr.")]

OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(metavar="SECTION.KEY=VALUE", help="Settings that replace the recipe's: trainer.max_steps=100."),
]


TasksOption = Annotated[
    str | None, typer.Option(help="Tasks, with commas between; all nine by default. docs/evaluation.md lists them.")
]
PromptsOption = Annotated[
    list[Path] | None, typer.Option(help="JSONL file of conversations or `turns`, a task. May be repeated.")
]
TasksDirOption = Annotated[
    Path | None,
    typer.Option(exists=True, file_okay=False, help="Folder with a JSONL file a task, so that nothing is downloaded."),
]
TemperatureOption = Annotated[float, typer.Option(min=0, help="0 is greedy; published figures have 1.")]
MaxNewTokensOption = Annotated[int, typer.Option(min=1, help="Most tokens a sample grows by.")]
ThinkingOption = Annotated[bool, typer.Option("--thinking", help="Chat template in its thinking mode.")]
DeviceOption = Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="auto takes a GPU where there is one.")]
DtypeOption = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="auto is bfloat16 on GPUs, float32 on CPUs.")
]
NoSpeedupOption = Annotated[
    bool, typer.Option("--no-speedup", help="Leave out decoding by the target alone, which takes the longest.")
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


def choose_dtype(
    wanted: Literal["auto", "float32", "bfloat16", "float16"], device: Literal["cpu", "cuda"]
) -> Literal["float32", "bfloat16", "float16"]:
    """What to decode in: auto is what GPUs serve in, and what is exact on CPUs."""
    if wanted == "auto":
        return "bfloat16" if device == "cuda" else "float32"
    return wanted


def choose_tasks(
    tasks: str | None, folder: Path | None, prompts: Sequence[Path] | None, max_samples: int | None
) -> TaskChoice:
    """What to decode, as the options say."""
    from evaluation.session import TaskChoice

    return TaskChoice(
        names=None if tasks is None else tuple(name.strip() for name in tasks.split(",") if name.strip()),
        folder=folder,
        prompts=tuple(prompts or ()),
        max_samples=max_samples,
    )


def hardware_of(device: Literal["cpu", "cuda"]) -> str:
    """What this process decodes on, to be written beside its times."""
    from evaluation.bench.hardware import describe_hardware

    if device == "cpu":
        return describe_hardware()
    import torch

    return f"{torch.cuda.get_device_name()}, {describe_hardware()}"
