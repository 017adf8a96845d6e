"""`slipstream bench`: benchmarks, each of which prints a ratio measured in one run."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from trainer.commands.options import JsonOption, OverridesArgument, fail

app = typer.Typer(no_args_is_help=True, help="Benchmarks: each prints a ratio measured in one run.")


@app.command("features")
def bench_features(overrides: OverridesArgument = None, as_json: JsonOption = False) -> None:
    """What the streamed features are worth: the demo against the same run with their positions permuted."""
    from evaluation.bench.features import measure_feature_worth
    from services.errors import SlipstreamError
    from trainer.console import RunConsole

    console = RunConsole(to_stderr=True)
    try:
        worth = measure_feature_worth(overrides or [], console.say)
    except SlipstreamError as error:
        fail(console, str(error), error.exit_code)
    if as_json:
        print(json.dumps(worth.as_json()))
        return
    for name, run in (("in place", worth.ordered), ("permuted", worth.permuted)):
        low, high = run["accepted_length_end_interval"]
        print(f"features {name}: τ {run['accepted_length_end']:.2f} (95 % interval {low:.2f} – {high:.2f})")
    verdict = "apart" if worth.intervals_apart else "NOT apart"
    print(f"ratio {worth.ratio:.2f}, intervals {verdict}; {worth.as_json()['hardware']}")


@app.command("run")
def bench_run(
    overrides: OverridesArgument = None,
    pairs: Annotated[int, typer.Option(min=4, help="Pairs of turns to compare, ten seconds each.")] = 24,
    as_json: JsonOption = False,
) -> None:
    """What dashboard and telemetry cost the training: step time with and without them, in turns, in one run."""
    from evaluation.bench.overhead import measure_overhead
    from services.errors import SlipstreamError
    from trainer.console import RunConsole

    console = RunConsole(to_stderr=True)
    try:
        overhead = measure_overhead(overrides or [], console.say, num_pairs=pairs)
    except SlipstreamError as error:
        fail(console, str(error), error.exit_code)
    if as_json:
        print(json.dumps(overhead.as_json()))
        return
    low, high = overhead.interval
    print(f"step time: {overhead.watched_step_s:.4f} s watched, {overhead.unwatched_step_s:.4f} s unwatched")
    print(
        f"telemetry in the rank: {overhead.emit_s * 1e6:.0f} µs of processor time a step ({overhead.emit_fraction:.2%})"
    )
    print(
        f"ratio {overhead.ratio:.3f} (95 % interval {low:.3f} – {high:.3f}) over {overhead.num_pairs} pairs of turns, "
        f"{overhead.num_steps} steps; {overhead.as_json()['hardware']}"
    )


@app.command("train")
def bench_train(
    rounds: Annotated[int, typer.Option(min=1, help="Steps of each drafter and way, taken in turns.")] = 9,
    threads: Annotated[int | None, typer.Option(min=1, help="torch threads; torch's own choice by default.")] = None,
    as_json: JsonOption = False,
) -> None:
    """What the fused loss is worth: step time and memory of the loss, fused against plain, for each drafter."""
    import torch

    from evaluation.bench.train import FORMULA, measure_training
    from trainer.console import RunConsole
    from trainer.summary import format_bytes

    if threads:
        torch.set_num_threads(threads)
    result = measure_training(RunConsole(to_stderr=True).say, rounds=rounds)
    if as_json:
        print(json.dumps(result))
        return
    for size, measured in result["sizes"].items():
        for drafter, ways in measured["drafters"].items():
            for kind, measure in ways.items():
                mfu = "" if measure["mfu"] is None else f", MFU {measure['mfu']:.1%}"
                print(
                    f"{size} {drafter} {kind}: step {measure['step_s']:.3f} s, {measure['tokens_per_s']:.0f} tokens/s"
                    f"{mfu}, loss part at most {format_bytes(measure['peak_loss_bytes'])}"
                )
            fused, plain = ways["fused"], ways["plain"]
            print(
                f"{size} {drafter} fused / plain: step {fused['step_s'] / plain['step_s']:.2f}, "
                f"memory {fused['peak_loss_bytes'] / plain['peak_loss_bytes']:.3f}"
            )
    print(f"{FORMULA}\n{result['hardware']}, {result['threads']} threads")
