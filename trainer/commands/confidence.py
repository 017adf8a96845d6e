"""`slipstream confidence`: what a drafter's confidence head is worth, and temperatures that calibrate it."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from trainer.commands.options import (
    DeviceOption,
    DtypeOption,
    JsonOption,
    MaxNewTokensOption,
    PromptsOption,
    TasksDirOption,
    TasksOption,
    TemperatureOption,
    ThinkingOption,
    choose_device,
    choose_dtype,
    choose_tasks,
    fail,
    hardware_of,
)

Number = TypeVar("Number", int, float)


def confidence(
    target: Annotated[str, typer.Option(help="Hugging Face folder or hub name of the target.")],
    drafter: Annotated[
        Path, typer.Option(help="DSpark checkpoint in the native format: a step_<N> folder, or a released one.")
    ],
    output_dir: Annotated[
        Path, typer.Option("--output-dir", help="Where records and figures go. What is there is gone on with.")
    ],
    tasks: TasksOption = None,
    prompts: PromptsOption = None,
    tasks_dir: TasksDirOption = None,
    max_samples: Annotated[
        int, typer.Option(min=2, help="Most samples of each task; half of them are fitted on.")
    ] = 32,
    temperature: TemperatureOption = 1.0,
    max_new_tokens: MaxNewTokensOption = 2048,
    thresholds: Annotated[
        str, typer.Option(help="Confidence thresholds of the sweep, with commas between.")
    ] = "0,0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9",
    calibrated: Annotated[
        bool, typer.Option("--calibrated", help="Compare thresholds with calibrated confidences.")
    ] = False,
    concurrency: Annotated[
        str, typer.Option(help="Numbers of requests whose steps are measured, with commas between.")
    ] = "1,2,4,8,16,32",
    no_save: Annotated[
        bool, typer.Option("--no-save", help="Leave the drafter's folder as it is: temperatures go to the output only.")
    ] = False,
    thinking: ThinkingOption = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples decoded at once.")] = 16,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="torch threads; torch's choice by default.")] = None,
    other_target: Annotated[
        bool, typer.Option("--other-target", help="Measure a drafter that was trained with another target, too.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """How far a DSpark drafter's confidences can be trusted, and what verifying by them is worth.

    Decodes prompts, fits a temperature for each drafted token on one half of them, and on the other half shows
    calibration, a sweep of confidence thresholds, and the throughput of verifying as many drafts as pay, on step times
    that it measures here. The temperatures are saved beside the drafter; slipstream eval --calibrated decodes with
    them. Stop it at any time: the same command goes on where it stopped. docs/confidence.md explains every figure.

    Example: slipstream confidence --target Qwen/Qwen3-4B --drafter run/step_best --tasks gsm8k --output-dir out
    """
    from services.errors import SlipstreamError
    from trainer.console import RunConsole

    console = RunConsole(to_stderr=as_json)
    try:
        from evaluation.benchmark import BenchmarkSettings
        from evaluation.confidence.study import DIAGRAMS_PNG, Decoder, StudyPlan, check_has_head, run_study
        from evaluation.session import prepare
        from trainer.confidence_console import StudyDisplay, study_tables

        plan = StudyPlan(
            thresholds=tuple(_numbers("--thresholds", thresholds, float, 0, 1)),
            calibrated_sweep=calibrated,
            concurrencies=tuple(sorted(set(_numbers("--concurrency", concurrency, int, 1, 4096)))),
        )
        check_has_head(drafter.expanduser())
        place = choose_device(device)
        settings = BenchmarkSettings(
            target=target,
            drafter=str(drafter),
            temperature=temperature,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            enable_thinking=thinking,
            dtype=choose_dtype(dtype, place),
            device=place,
            threads=threads,
            measure_speedup=False,
            allow_other_target=other_target,
        )
        choice = choose_tasks(tasks, tasks_dir, prompts, max_samples)
        session = prepare(settings, choice, console.say)

        def start() -> Decoder:
            from evaluation.confidence.decoding import StudyDecoder

            return StudyDecoder(session)

        with StudyDisplay(console.console) as display:
            study = run_study(
                session,
                plan,
                output_dir,
                start,
                display,
                save_to=None if no_save else Path(session.settings.drafter),
                hardware=hardware_of(place),
            )
    except SlipstreamError as error:
        fail(console, str(error), error.exit_code)
    except KeyboardInterrupt:
        command = shlex.join(["slipstream", *sys.argv[1:]])
        fail(console, f"stopped; to go on run the same command again:\n  {command}", 1)
    if as_json:
        print(study.model_dump_json())
        return
    console.say(study_tables(study))
    console.say(f"figures: {output_dir}, diagrams: {output_dir / DIAGRAMS_PNG}")
    if study.saved_to:
        console.say(f"temperatures: {study.saved_to}; slipstream eval --calibrated decodes with them")


def _numbers(option: str, text: str, kind: Callable[[str], Number], low: Number, high: Number) -> list[Number]:
    from services.errors import UsageError

    found = []
    for part in text.split(","):
        try:
            number = kind(part)
        except ValueError:
            number = None
        if number is None or not low <= number <= high:
            raise UsageError(f"{option} {text}: {part.strip()!r} is no number from {low} to {high}")
        found.append(number)
    return found
