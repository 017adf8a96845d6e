"""`slipstream eval`: a drafter on the public benchmarks, or on prompts of your own."""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

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
)

if TYPE_CHECKING:
    from evaluation.benchmark import BenchmarkSettings
    from evaluation.session import StartDecoding
    from trainer.console import RunConsole


def evaluate(
    target: Annotated[str, typer.Option(help="Hugging Face folder or hub name of the target.")],
    drafter: Annotated[
        Path, typer.Option(help="Drafter checkpoint in the native format: a step_<N> folder, or a released one.")
    ],
    tasks: TasksOption = None,
    prompts: PromptsOption = None,
    tasks_dir: TasksDirOption = None,
    max_samples: Annotated[int | None, typer.Option(min=1, help="Most samples of each task.")] = None,
    temperature: TemperatureOption = 1.0,
    max_new_tokens: MaxNewTokensOption = 2048,
    confidence_threshold: Annotated[
        float, typer.Option(min=0, max=1, help="Cuts a proposal before the first unsure token.")
    ] = 0.0,
    calibrated: Annotated[
        bool,
        typer.Option("--calibrated", help="Compare it with confidences that slipstream confidence has calibrated."),
    ] = False,
    thinking: ThinkingOption = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples decoded at once, by each replica.")] = 16,
    replicas: Annotated[int, typer.Option(min=1, help="Processes that share the samples, on Ray if several.")] = 1,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="torch threads of each process.")] = None,
    no_speedup: NoSpeedupOption = False,
    other_target: Annotated[
        bool, typer.Option("--other-target", help="Measure a drafter that was trained with another target, too.")
    ] = False,
    output_dir: Annotated[
        Path | None,
        typer.Option(help="Where records and figures go; slipstream-eval/… by default. What is there is gone on with."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """How many tokens a target forward yields with a drafter, and how much faster that is, task by task.

    Decodes for real and losslessly, in the protocol of the published figures. Stop it at any time: the same command
    goes on where it stopped.

    Example: slipstream eval --target Qwen/Qwen3-4B --drafter run/step_best --tasks gsm8k,humaneval --max-samples 64
    """
    from services.errors import SlipstreamError
    from trainer.console import RunConsole

    console = RunConsole(to_stderr=as_json)
    try:
        from evaluation.benchmark import BenchmarkSettings
        from evaluation.outputs import as_json as to_json
        from evaluation.outputs import write_outputs
        from evaluation.session import closing_warnings, prepare, run
        from trainer.eval_console import EvaluationDisplay, results_table

        place = _device(device, replicas)
        temperatures = _temperatures(drafter, confidence_threshold) if calibrated else None
        settings = BenchmarkSettings(
            target=target,
            drafter=str(drafter),
            temperature=temperature,
            max_new_tokens=max_new_tokens,
            confidence_threshold=confidence_threshold,
            confidence_temperatures=temperatures,
            batch_size=batch_size,
            enable_thinking=thinking,
            dtype=choose_dtype(dtype, place),
            device=place,
            threads=threads or _threads_of_each(replicas, place),
            measure_speedup=not no_speedup,
            allow_other_target=other_target,
        )
        choice = choose_tasks(tasks, tasks_dir, prompts, max_samples)
        session = prepare(settings, choice, console.say)
        folder = output_dir or session.default_folder()
        with EvaluationDisplay(console.console) as display:
            results = run(
                session,
                folder,
                _start(session.settings, replicas, console),
                piece_size=batch_size * _batches_a_piece(replicas),
                begin=display.begin,
                on_record=display.on_record,
            )
        warnings = closing_warnings(session, results)
        write_outputs(session, results, warnings, folder)
    except SlipstreamError as error:
        fail(console, str(error), error.exit_code)
    except KeyboardInterrupt:
        command = shlex.join(["slipstream", *sys.argv[1:]])
        fail(console, f"stopped; to go on run the same command again:\n  {command}", 1)
    if as_json:
        print(json.dumps(to_json(session, results, warnings, folder)))
        return
    console.say(results_table(session, results, warnings))
    console.say(f"records, JSON, CSV and TensorBoard files: {folder}")


def _device(wanted: Literal["auto", "cpu", "cuda"], replicas: int) -> Literal["cpu", "cuda"]:
    """What to decode on. With replicas the GPUs need not be this machine's."""
    return "cuda" if wanted == "cuda" and replicas > 1 else choose_device(wanted)


def _temperatures(drafter: Path, threshold: float) -> tuple[float, ...]:
    from evaluation.confidence.temperatures import ConfidenceTemperatures
    from services.errors import UsageError

    if not threshold:
        raise UsageError("--calibrated changes what a threshold is compared with: give --confidence-threshold, too")
    return ConfidenceTemperatures.load(drafter.expanduser()).temperatures


def _threads_of_each(replicas: int, device: str) -> int | None:
    """Replicas on one machine's CPU share its cores; one alone takes torch's choice."""
    if replicas == 1 or device == "cuda":
        return None
    return max(1, (os.cpu_count() or 1) // replicas)


def _batches_a_piece(replicas: int) -> int:
    from evaluation.work import BATCHES_A_PIECE, BATCHES_A_SHARED_PIECE

    return BATCHES_A_PIECE if replicas == 1 else BATCHES_A_SHARED_PIECE


def _start(settings: BenchmarkSettings, replicas: int, console: RunConsole) -> StartDecoding:
    if replicas == 1:
        from evaluation.sample_decoder import decoding_here

        return lambda: decoding_here(settings)
    from trainer.replicas import decoding_on_replicas

    return lambda: decoding_on_replicas(settings, replicas, console.say)
