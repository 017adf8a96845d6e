"""`slipstream compare`: drafters head to head."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from trainer.commands.options import (
    DeviceOption,
    DtypeOption,
    JsonOption,
    MaxNewTokensOption,
    NoSpeedupOption,
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


def compare(
    target: Annotated[str, typer.Option(help="Hugging Face folder or hub name of the target that all were made for.")],
    drafters: Annotated[
        list[Path] | None,
        typer.Argument(metavar="D1 D2 …", help="Checkpoints in the native format: step_<N> folders, or released ones."),
    ] = None,
    tasks: TasksOption = None,
    prompts: PromptsOption = None,
    tasks_dir: TasksDirOption = None,
    max_samples: Annotated[int | None, typer.Option(min=1, help="Most samples of each task.")] = None,
    temperature: TemperatureOption = 1.0,
    max_new_tokens: MaxNewTokensOption = 2048,
    thinking: ThinkingOption = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples decoded at once.")] = 16,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="torch threads; torch's choice by default.")] = None,
    no_speedup: NoSpeedupOption = False,
    other_target: Annotated[
        bool, typer.Option("--other-target", help="Compare drafters that were trained with another target, too.")
    ] = False,
    output_dir: Annotated[
        Path | None,
        typer.Option(
            help="Where records and the report go; slipstream-compare/… by default. What is there is gone on with."
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Put drafters of one target head to head: the same prompts, the same seeds, one report with pictures.

    Decodes for real and losslessly. Stop it at any time: the same command goes on where it stopped, and with one more
    drafter and the same --output-dir only the new one is decoded. docs/compare.md explains every figure.

    Example: slipstream compare dspark/step_best dflash/step_best --target Qwen/Qwen3-4B --tasks gsm8k --max-samples 64
    """
    from services.errors import SlipstreamError
    from trainer.console import RunConsole

    console = RunConsole(to_stderr=as_json)
    command = ["slipstream", *sys.argv[1:]]
    try:
        from evaluation.benchmark import BenchmarkSettings
        from evaluation.compare.comparison import compare as sum_up
        from evaluation.compare.entrants import prepare_match
        from evaluation.compare.match import run_match
        from evaluation.compare.outputs import as_json as to_json
        from evaluation.compare.outputs import write_outputs
        from evaluation.compare.report import REPORT
        from evaluation.work import BATCHES_A_PIECE
        from trainer.compare_console import CompareDisplay, comparison_tables
        from trainer.provenance import collect_provenance

        place = choose_device(device)

        def settings_of(drafter: str) -> BenchmarkSettings:
            return BenchmarkSettings(
                target=target,
                drafter=drafter,
                temperature=temperature,
                max_new_tokens=max_new_tokens,
                batch_size=batch_size,
                enable_thinking=thinking,
                dtype=choose_dtype(dtype, place),
                device=place,
                threads=threads,
                measure_speedup=not no_speedup,
                allow_other_target=other_target,
            )

        choice = choose_tasks(tasks, tasks_dir, prompts, max_samples)
        match = prepare_match(drafters or [], settings_of, choice, console.say)
        folder = output_dir or match.default_folder()
        with CompareDisplay(console.console) as display:
            from evaluation.compare.decoding import decoding_with_each

            decoded = run_match(
                match,
                folder,
                decoding_with_each,
                piece_size=batch_size * BATCHES_A_PIECE,
                begin=display.begin,
                on_record=display.on_record,
            )
        comparison = sum_up(match, decoded, collect_provenance(command), hardware_of(place))
        write_outputs(comparison, folder)
    except SlipstreamError as error:
        fail(console, str(error), error.exit_code)
    except KeyboardInterrupt:
        fail(console, f"stopped; to go on run the same command again:\n  {shlex.join(command)}", 1)
    if as_json:
        print(json.dumps(to_json(comparison, folder)))
        return
    console.say(comparison_tables(comparison))
    console.say(f"report with pictures: {folder / REPORT}; JSON and CSV beside it")
