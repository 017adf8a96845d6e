"""`slipstream export`: a drafter in the format that a server loads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from trainer.commands.options import JsonOption, fail


def export(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="D", help="A run's step_<N>, step_latest or step_best, or any drafter's folder.")
    ],
    to: Annotated[Literal["sglang", "vllm", "native"], typer.Option("--to", help="Whose format to write.")],
    output_dir: Annotated[
        Path, typer.Option("--output-dir", help="Folder to make; it appears only once it is checked.")
    ],
    target: Annotated[
        str | None, typer.Option(help="Folder or hub name of the target; what the run's recipe says by default.")
    ] = None,
    draft_vocab_size: Annotated[
        int | None,
        typer.Option(min=2, help="Eagle3: draft only so many tokens, the most frequent of the answers it learned."),
    ] = None,
    thinking: Annotated[
        bool | None,
        typer.Option("--thinking/--no-thinking", help="Chat-template mode you will serve in; warns of another one."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier export in --output-dir.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Write a drafter for SGLang or vLLM, read it back, and check that it drafts as before.

    What a server's classes cannot compute is refused, with the recipe's line to change: SGLang takes Eagle3 of the
    layout `llama`, DFlash that predicts from the masks alone (sample_from_anchor: false), and DSpark; vLLM takes
    DSpark with a vanilla Markov head, DFlash and Eagle3. The folder also gets a model card with what the run measured.
    If the check fails, nothing is left. docs/export.md says what is written.

    Example: slipstream export runs/qwen3-4b/step_best --to vllm --output-dir qwen3-4b-drafter
    """
    from services.errors import SlipstreamError
    from trainer.console import RunConsole

    console = RunConsole(to_stderr=as_json)
    try:
        console.phase("loading")
        from trainer.export import export_drafter

        result = export_drafter(
            checkpoint,
            to,
            output_dir,
            say=console.say,
            target=target,
            draft_vocab_size=draft_vocab_size,
            thinking=thinking,
            force=force,
        )
    except SlipstreamError as error:
        fail(console, str(error), error.exit_code)
    except KeyboardInterrupt:
        fail(console, "stopped; nothing was written. The same command begins again", 1)
    for warning in result.warnings:
        console.say(f"mind: {warning}")
    if as_json:
        print(result.model_dump_json())
        return
    size = sum(result.files.values())
    console.say(
        f"{result.output_dir}: {result.architecture}, {size / 1e6:,.1f} MB; {result.num_drafts_compared} greedy drafts "
        f"and all logits equal the drafter's (largest difference {result.max_logit_difference:.1g})"
    )
