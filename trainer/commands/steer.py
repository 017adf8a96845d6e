"""`slipstream status`, `scale`, `pause`, `continue`, `stop`: look at and steer running jobs from any shell."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from trainer.commands.options import JsonOption, fail

if TYPE_CHECKING:
    from rich.console import RenderableType

    from services.control.client import RunControl
    from services.control.records import Reply, RunStatus

REFRESH_S = 1.0
"""How often `--watch` asks; a driver says as often how its run is."""

STOP_WAIT_S = 300.0
"""`stop --wait`: a step, its checkpoint and the end of every part."""

RUN_HELP = "The run: its id, its recipe's name, or its output directory."

RunArgument = Annotated[str, typer.Argument(metavar="RUN", help=RUN_HELP)]
AddressOption = Annotated[
    str | None,
    typer.Option(metavar="HOST:PORT", help="Head of the Ray cluster; RAY_ADDRESS or this machine's by default."),
]
RequestIdOption = Annotated[
    str | None,
    typer.Option(help="Of your choice: the same id again is answered again, and not carried out again."),
]


def status(
    run: Annotated[str | None, typer.Argument(help=f"{RUN_HELP} All runs by default.")] = None,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Stay and show it live; end with Ctrl-C.")] = False,
    address: AddressOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show how a run is, or all runs of the cluster.

    Example: slipstream status --watch
    """
    if watch and as_json:
        raise typer.BadParameter("--watch is for people; a script asks again and again without it")
    with _errors():
        ask = _status_source(run, address)
        if watch:
            _watch(ask)
            return
        statuses = ask()
    if not as_json:
        from rich.console import Console

        Console(highlight=False).print(_view(statuses))
    elif run is None:
        print(json.dumps({"runs": [each.model_dump(mode="json") for each in statuses]}))
    else:
        print(statuses[0].model_dump_json())


def scale(
    run: RunArgument,
    settings: Annotated[
        list[str],
        typer.Argument(
            metavar="targets=N|autoscale=on|off", help="How many target servers to have, or who decides that."
        ),
    ],
    request_id: RequestIdOption = None,
    address: AddressOption = None,
    as_json: JsonOption = False,
) -> None:
    """Have another number of targets; the trainer does not notice.

    New ones load and are used as they come up. Fewer: those too many finish their captures and end. A run whose recipe
    has target.autoscale keeps the number you give until autoscale=on.

    Example: slipstream scale demo targets=3
    """
    with _errors():
        is_on = parse_autoscale(settings)
        targets = parse_targets(settings) if is_on is None else 0
        control = _attach(run, address)
        if is_on is None:
            reply = control.scale(targets, request_id=request_id)
        else:
            reply = control.autoscale(is_on, request_id=request_id)
        _show(control, reply, as_json=as_json)


def pause(
    run: RunArgument,
    request_id: RequestIdOption = None,
    address: AddressOption = None,
    as_json: JsonOption = False,
) -> None:
    """Begin no further optimizer step; targets idle once the buffer is full."""
    with _errors():
        control = _attach(run, address)
        _show(control, control.pause(request_id=request_id), as_json=as_json)


def continue_(
    run: RunArgument,
    request_id: RequestIdOption = None,
    address: AddressOption = None,
    as_json: JsonOption = False,
) -> None:
    """Go on after a pause."""
    with _errors():
        control = _attach(run, address)
        _show(control, control.continue_(request_id=request_id), as_json=as_json)


def stop(
    run: RunArgument,
    wait: Annotated[bool, typer.Option("--wait", help="Return once the run has ended.")] = False,
    request_id: RequestIdOption = None,
    address: AddressOption = None,
    as_json: JsonOption = False,
) -> None:
    """Finish the step, write a checkpoint and end the run; the command that started it goes on from there."""
    with _errors():
        from services.control.ending import RunEnd

        control = _attach(run, address)
        end = RunEnd.of(control) if wait else None
        _show(control, control.stop(request_id=request_id), as_json=as_json)
        if end is not None:
            end.wait(STOP_WAIT_S)


def parse_targets(settings: Sequence[str]) -> int:
    """The number in `targets=N`.

    Raises:
        UsageError: It is something else.
    """
    from services.errors import UsageError

    if len(settings) == 1:
        name, _, number = settings[0].partition("=")
        if name == "targets" and number.isascii() and number.removeprefix("-").isdigit():
            return int(number)
    raise UsageError(
        f"{' '.join(settings)!r} must be targets=N, for example targets=3, or "
        "autoscale=on or off: only targets can be scaled"
    )


def parse_autoscale(settings: Sequence[str]) -> bool | None:
    """Whether `autoscale=on` or `autoscale=off` is asked for; None if it is something else."""
    return {"autoscale=on": True, "autoscale=off": False}.get(" ".join(settings))


def _attach(run: str, address: str | None) -> RunControl:
    from services.control.client import attach

    return attach(run, address=address)


def _show(control: RunControl, reply: Reply, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"run_id": control.run_id, "request_id": reply.request_id, "message": reply.message}))
    else:
        print(f"{control.run_id}: {reply.message}")


def _status_source(run: str | None, address: str | None) -> Callable[[], list[RunStatus]]:
    """What asks for the status of the run, or of all runs that there are at that moment."""
    from services.control.client import RunControl, RunEndedError, UnknownRunError, attach, running_runs

    if run is not None:
        control = attach(run, address=address)
        return lambda: [control.status()]

    def ask_all() -> list[RunStatus]:
        statuses = []
        for run_id in running_runs(address=address):
            try:
                statuses.append(RunControl(run_id).status())
            except (RunEndedError, UnknownRunError):
                continue  # it ended just now
        return statuses

    return ask_all


def _view(statuses: Sequence[RunStatus]) -> RenderableType:
    from trainer.status_view import run_view, runs_view

    now_s = time.time()
    return run_view(statuses[0], now_s) if len(statuses) == 1 else runs_view(statuses, now_s)


def _watch(ask: Callable[[], list[RunStatus]]) -> None:
    from rich.console import Console
    from rich.live import Live

    from services.control.client import RunEndedError

    console = Console(highlight=False)
    try:
        with Live(_view(ask()), console=console, auto_refresh=False, screen=False) as live:
            while True:
                time.sleep(REFRESH_S)
                live.update(_view(ask()), refresh=True)
    except RunEndedError as error:
        console.print(str(error))
    except KeyboardInterrupt:
        return


@contextmanager
def _errors() -> Iterator[None]:
    """Errors that the user can act on, as one line and an exit code."""
    from services.errors import SlipstreamError
    from trainer.console import RunConsole

    try:
        yield
    except SlipstreamError as error:
        fail(RunConsole(to_stderr=True), str(error), error.exit_code)
