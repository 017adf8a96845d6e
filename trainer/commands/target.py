"""`slipstream target serve`: a target by itself, for anyone who speaks gRPC."""

from __future__ import annotations

import json
import os
import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from trainer.commands.options import JsonOption, fail
from trainer.commands.serving import (
    WAYS_TO_LISTEN,
    CertificateOption,
    CredentialsOption,
    HostOption,
    InsecureOption,
    KeyOption,
    PortOption,
    TokenFileOption,
    credentials_of,
    join,
    reachable,
)

if TYPE_CHECKING:
    from services.contracts import TargetDescription
    from services.security import Credentials

DEFAULT_PORT = 50051
"""What gRPC's own examples use."""

CHECK_EVERY_S = 1.0
"""How often the device is looked at; one that has failed ends the command, so that it can be started anew."""

GRACE_S = 10.0
"""How long captures may go on after Ctrl-C."""

app = typer.Typer(no_args_is_help=True, help="A target by itself, outside any run.")


@app.callback()
def target() -> None:
    """A target by itself, outside any run."""


@app.command()
def serve(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Hugging Face folder or hub name of the model.")],
    host: HostOption = "127.0.0.1",
    port: PortOption = DEFAULT_PORT,
    credentials: CredentialsOption = None,
    token_file: TokenFileOption = None,
    tls_cert: CertificateOption = None,
    tls_key: KeyOption = None,
    insecure: InsecureOption = False,
    cpu: Annotated[bool, typer.Option("--cpu", help="Compute on the CPU; a GPU by default.")] = False,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"], typer.Option(help="Compute dtype; CPUs are quicker in float32.")
    ] = "bfloat16",
    threads: Annotated[int | None, typer.Option(min=1, help="torch threads; torch's choice by default.")] = None,
    max_batch_tokens: Annotated[
        int, typer.Option(min=1, help="Token budget of one forward pass, and of one request.")
    ] = 16384,
    max_concurrent_captures: Annotated[
        int, typer.Option(min=1, help="Captures served at once; more are refused.")
    ] = 64,
    as_json: JsonOption = False,
) -> None:
    """Serve the hidden states of MODEL over gRPC until Ctrl-C.

    On this machine anyone may call. Beyond it callers need a token, and the connection is encrypted: with --credentials
    both are made on first use, and callers take token and certificate.pem from that folder. Health checking and server
    reflection are on, under the same rules. docs/target-service.md shows how to call it.

    Example: slipstream target serve Qwen/Qwen3-0.6B --host 0.0.0.0 --credentials ./target-credentials
    """
    from services.memory import keep_freed_memory

    keep_freed_memory()
    from services.errors import SlipstreamError
    from services.security import check_listening
    from services.target.config import TargetConfig
    from trainer.console import RunConsole

    console = RunConsole(to_stderr=as_json)
    stopping = threading.Event()
    try:
        access = credentials_of(credentials, token_file, tls_cert, tls_key, host, insecure=insecure)
        check_listening(
            "the target",
            host,
            token=access.token is not None,
            tls=access.has_tls,
            insecure=insecure,
            ways=WAYS_TO_LISTEN,
        )
        config = TargetConfig(
            model=model,
            dtype=dtype,
            num_gpus=0 if cpu else 1,
            threads=threads,
            max_batch_tokens=max_batch_tokens,
            max_concurrent_captures=max_concurrent_captures,
        )
        console.say(f"loading {model}")
        import torch

        from services.target.engine import TransformersEngine
        from services.target.server import serve as start

        if threads is not None:
            torch.set_num_threads(threads)
        engine = TransformersEngine(config)
        server = start(engine, config, join(host, port), access)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stopping.set())
        address = reachable(server.address)
        if as_json:
            print(json.dumps(_place(address, engine.describe(), access)), flush=True)
        console.say(_greeting(address, engine.describe(), access, credentials))
        try:
            while not stopping.wait(CHECK_EVERY_S):
                engine.check()
        finally:
            server.stop(GRACE_S)
    except SlipstreamError as error:
        fail(console, str(error), error.exit_code)
    except KeyboardInterrupt:
        fail(console, "stopped before it served", 1)
    console.say("stopped")


def _place(address: str, description: TargetDescription, access: Credentials) -> dict[str, str | int | bool]:
    return {
        "address": address,
        "model": description.model_name,
        "fingerprint": description.fingerprint,
        "max_tokens": description.max_tokens,
        "token": access.token is not None,
        "tls": access.has_tls,
        "pid": os.getpid(),
    }


def _greeting(address: str, description: TargetDescription, access: Credentials, folder: Path | None) -> str:
    lines = [f"serves {description.model_name} (fingerprint {description.fingerprint}) at {address}"]
    if folder is not None:
        lines.append(f"callers need {folder / 'token'} and {folder / 'certificate.pem'}")
    elif access.token is None:
        lines.append("whoever reaches this address may call")
    lines.append("Ctrl-C ends it")
    return "\n".join(lines)
