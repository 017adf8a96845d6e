"""The `slipstream` command. Arguments are parsed before anything heavy is imported, so `--help` is instant.

Here the commands of `trainer/commands` are put together; each module there is one group of them.
"""

from __future__ import annotations

import typer

from trainer.commands import bench, replay, target
from trainer.commands.compare import compare
from trainer.commands.confidence import confidence
from trainer.commands.dashboard import dashboard
from trainer.commands.eval import evaluate
from trainer.commands.export import export
from trainer.commands.run import demo, run
from trainer.commands.steer import continue_, pause, scale, status, stop
from trainer.commands.submit import submit

app = typer.Typer(
    name="slipstream",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Train drafters for speculative decoding on the hidden states of a live target: streamed, never stored.",
)

app.command()(demo)
app.command()(run)
app.command()(submit)
app.command()(status)
app.command()(scale)
app.command()(pause)
app.command("continue")(continue_)
app.command()(stop)
app.command()(dashboard)
app.command()(export)
app.command("eval")(evaluate)
app.command()(confidence)
app.command()(compare)
app.add_typer(bench.app, name="bench")
app.add_typer(target.app, name="target")
app.add_typer(replay.app, name="replay")


def main() -> None:
    """Entry point of the console command."""
    app()
