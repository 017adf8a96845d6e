"""`slipstream bench`: benchmarks, each of which prints a ratio measured in one run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from trainer.commands.options import JsonOption, OverridesArgument, fail

YARDSTICKS = {
    "raw TCP": "tcp_loopback_mb_s",
    "one gRPC hop": "grpc_hop_mb_s",
    "Redis SET": "redis_set_mb_s",
    "Redis GET": "redis_get_mb_s",
    "disk way": "disk_way_mb_s",
    "disk way, read from the disk": "cold_disk_way_mb_s",
}
"""What `bench stream` holds the path against, as people and as scripts read it."""

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


@app.command("stream")
def bench_stream(
    rounds: Annotated[int, typer.Option(min=1, help="Each takes every way once, in turns.")] = 5,
    samples: Annotated[int, typer.Option(min=1, help="Samples that a way moves in a round, 31.5 MB each.")] = 64,
    tier: Annotated[list[str] | None, typer.Option(help="Only this tier: redis or shm. May be repeated.")] = None,
    wire_dtype: Annotated[list[str] | None, typer.Option(help="Only this dtype on the wire. May be repeated.")] = None,
    shards: Annotated[list[int] | None, typer.Option(help="Only so many shards. May be repeated.")] = None,
    disk: Annotated[
        Path | None, typer.Option(exists=True, file_okay=False, help="Folder for the disk way; the current one.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """How fast features get from a target's memory into the trainer's tensors, beside what the machine can do."""
    from services.errors import SlipstreamError
    from trainer.bench.starvation import measure_starvation
    from trainer.bench.stream import QWEN3_4B, choose_ways, measure_stream
    from trainer.console import RunConsole
    from trainer.summary import format_bytes

    console = RunConsole(to_stderr=True)
    try:
        ways = choose_ways(tiers=tier, wire_dtypes=wire_dtype, shards=shards)
        result = measure_stream(console.say, ways=ways, rounds=rounds, num_samples=samples, disk=disk or Path.cwd())
        result["starvation"] = measure_starvation(console.say, QWEN3_4B)
    except SlipstreamError as error:
        fail(console, str(error), error.exit_code)
    if as_json:
        print(json.dumps(result))
        return
    for name, key in YARDSTICKS.items():
        print(f"{name:28} {result[key]:6.0f} MB/s")
    print(f"the hop is {result['hop_to_tcp']:.2f} of raw TCP")
    for way in result["results"]:
        cpu = ", ".join(f"{part} {cpu_s:.2f}" for part, cpu_s in way["cpu_s_per_gb"].items())
        print(
            f"{way['tier']:5} {way['wire_dtype']:8} {way['shards']} shards {way['end_to_end_mb_s']:6.0f} MB/s, "
            f"{way['to_hop']:.2f} of the hop, {way['to_disk_way']:.2f} of the disk way "
            f"({way['to_cold_disk_way']:.2f} read from the disk); CPU s/GB: {cpu}; resident at most "
            f"{format_bytes(way['peak_bytes'])} of {format_bytes(way['capacity_bytes'])}"
        )
    print(f"trainer wait in the starvation test: {result['starvation']['wait_fraction']:.2%}")
    print(f"{result['rounds']} rounds of {result['samples']} samples of {result['sample_mb']:.1f} MB")
    print(result["hardware"])


@app.command("eval")
def bench_eval(
    drafter: Annotated[Path | None, typer.Option(help="A checkpoint; an untrained drafter by default.")] = None,
    turns: Annotated[int, typer.Option(min=1, help="Times that each side decodes 16 prompts.")] = 5,
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Tokens a prompt.")] = 128,
    threads: Annotated[int | None, typer.Option(min=1, help="torch threads; torch's own choice by default.")] = None,
    as_json: JsonOption = False,
) -> None:
    """How fast evaluation decodes with the demo's target: 16 prompts at once against one after the other."""
    import torch

    from evaluation.bench.eval import measure_evaluation
    from services.errors import SlipstreamError
    from trainer.console import RunConsole

    if threads:
        torch.set_num_threads(threads)
    console = RunConsole(to_stderr=True)
    target = Path(__file__).parents[1] / "demo" / "target"
    try:
        result = measure_evaluation(target, drafter, console.say, turns=turns, max_new_tokens=max_new_tokens)
    except SlipstreamError as error:
        fail(console, str(error), error.exit_code)
    if as_json:
        print(json.dumps(result))
        return
    size = result["batch_size"]
    for side, speeds in result["tokens_per_s"].items():
        print(
            f"{side}: {speeds['1']:.0f} tokens/s one by one, {speeds[str(size)]:.0f} tokens/s with {size} at once, "
            f"ratio {result['ratio'][side]:.2f}"
        )
    phases = result["phases"]["speculative"]
    shares = ", ".join(f"{name} {phases[name + '_s']:.2f} s" for name in ("prefill", "draft", "verify", "overhead"))
    print(f"speedup over plain decoding {result['speedup']:.2f} at τ {result['accepted_length']:.2f} ({shares})")
    whole = result["evaluation"]
    print(f"evaluation of {whole['num_prompts']} prompts: {whole['seconds']:.1f} s, lossless check included")
    print(f"drafter: {result['drafter']}; {result['hardware']}, {result['threads']} threads")
