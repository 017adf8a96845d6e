"""`slipstream dashboard`: the page of a run, whether it runs, has finished or was killed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from services.reading import read_json
from trainer.commands.options import JsonOption, fail

if TYPE_CHECKING:
    from services.dashboard.access import Access

DEMO_DIR = "slipstream-demo"
RUNS_DIR = "runs"


def dashboard(
    run: Annotated[
        str | None,
        typer.Argument(metavar="OUTPUT_DIR|RUN", help="Output directory, or the id or name of a run found from here."),
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 0,
    host: Annotated[
        str,
        typer.Option(help="Where to listen; beyond this machine the page needs TLS, and opens with its token alone."),
    ] = "127.0.0.1",
    tls_cert: Annotated[Path | None, typer.Option(help="Certificate, or chain of them (PEM).")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its private key (PEM).")] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Listen anywhere without TLS. Only on a network you trust.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Serve the page of a run: its curves, its state, its controls. Ctrl-C ends the page, not the run.

    Without an argument: ./slipstream-demo, or the only run under ./runs. On this machine the page opens without its
    token; scaling, pausing and stopping need it, and the link that is printed has it.

    Example: slipstream dashboard runs/qwen3-4b --port 8080
    """
    from dataclasses import asdict

    from services.dashboard.access import Access
    from services.dashboard.feed import Feed
    from services.dashboard.remote import RayControls
    from services.dashboard.server import listen, published, serve
    from services.errors import SlipstreamError
    from trainer.console import RunConsole

    console = RunConsole(to_stderr=as_json)
    try:
        output_dir = find_run(run, Path.cwd())
        access = Access(host, certificate=tls_cert, key=tls_key, insecure=insecure)
        _check_pair(tls_cert, tls_key)
        listener = listen(access, port)
    except SlipstreamError as error:
        fail(console, str(error), error.exit_code)
    place = published(access, listener)
    if as_json:
        print(json.dumps(asdict(place) | {"output_dir": str(output_dir)}), flush=True)
    else:
        _show(console.say, output_dir, place.url, access)
    serve(Feed(output_dir), access, RayControls(output_dir, stays_attached=False), listener)


def _check_pair(certificate: Path | None, key: Path | None) -> None:
    """Check certificate and key before the web server reads them, which says little about what is wrong."""
    from services.errors import UsageError
    from services.security import read_certificate, read_key

    if (certificate is None) != (key is None):
        raise UsageError("--tls-cert and --tls-key go together: give both or neither")
    if certificate is not None and key is not None:
        read_key(key, read_certificate(certificate))


def find_run(wanted: str | None, folder: Path) -> Path:
    """The output directory that is meant.

    Args:
        wanted: A directory, or the id or name of a run in one of those that lie where runs usually do; None takes the
            demo's, or the only one.
        folder: Where to look.

    Raises:
        UsageError: There is none, or more than one; lists what is there.
    """
    from services.errors import UsageError

    if wanted is not None and _is_run(folder / Path(wanted).expanduser()):
        return (folder / Path(wanted).expanduser()).resolve()
    found = _runs(folder)
    if wanted is None and folder / DEMO_DIR in found:
        return folder / DEMO_DIR
    names = {path: _run_id(path) for path in found}
    matching = [path for path, name in names.items() if wanted in (None, name, name.rpartition("-")[0], path.name)]
    if len(matching) == 1:
        return matching[0]
    listed = ", ".join(f"{path.relative_to(folder)} ({name})" for path, name in names.items())
    there = f"here are: {listed}" if listed else f"there is none in {folder}, in ./{DEMO_DIR} and under ./{RUNS_DIR}"
    if not matching:
        raise UsageError(f"{f'{wanted} is no output directory and no run found here' if wanted else 'no run'}; {there}")
    raise UsageError(f"{len(matching)} runs could be meant: name one by its directory; {there}")


def _runs(folder: Path) -> list[Path]:
    """Output directories in the usual places, the newest last."""
    places = [folder, folder / DEMO_DIR, *sorted((folder / RUNS_DIR).glob("*")), *sorted(folder.glob("*"))]
    found = dict.fromkeys(path for path in places if _is_run(path))
    return sorted(found, key=lambda path: (path / "run.json").stat().st_mtime)


def _is_run(path: Path) -> bool:
    return (path / "run.json").is_file()


def _run_id(path: Path) -> str:
    try:
        return str(read_json((path / "run.json").read_bytes())["run_id"])
    except (OSError, ValueError, KeyError, TypeError):
        return "unreadable run.json"


def _show(say: Callable[[str], None], output_dir: Path, url: str, access: Access) -> None:
    say(f"dashboard of {output_dir}\n  {url}")
    if not access.is_local:
        say("Whoever has this link can see the run and steer it.")
    if not access.is_local and not access.has_tls:
        say("It is not encrypted: keep it on a network you trust.")
    say("Ctrl-C ends the page, not the run.")
