"""`slipstream target serve`: a target by itself, for anyone who speaks gRPC."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from trainer.commands.options import JsonOption, fail

if TYPE_CHECKING:
    from services.contracts import TargetDescription
    from services.security import Credentials

DEFAULT_PORT = 50051
"""What gRPC's own examples use."""

CHECK_EVERY_S = 1.0
"""How often the device is looked at; one that has failed ends the command, so that it can be started anew."""

GRACE_S = 10.0
"""How long captures may go on after Ctrl-C."""

WAYS_TO_LISTEN = (
    "Give --credentials DIR, or --token-file with --tls-cert and --tls-key; or --insecure, on a network you trust; or "
    "listen on 127.0.0.1 and forward the port"
)

app = typer.Typer(no_args_is_help=True, help="A target by itself, outside any run.")


@app.callback()
def target() -> None:
    """A target by itself, outside any run."""


@app.command()
def serve(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Hugging Face folder or hub name of the model.")],
    host: Annotated[str, typer.Option(help="Where to listen; beyond this machine only with token and TLS.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = DEFAULT_PORT,
    credentials: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder with token, certificate.pem and key.pem; made on first use. Callers need the first two.",
        ),
    ] = None,
    token_file: Annotated[Path | None, typer.Option(help="File with the token that every call must carry.")] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="Certificate, or chain of them (PEM).")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its private key (PEM).")] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Listen anywhere without what is missing. Only on a network you trust.")
    ] = False,
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
    from services.errors import SlipstreamError
    from services.security import check_listening
    from services.target.config import TargetConfig
    from trainer.console import RunConsole

    console = RunConsole(to_stderr=as_json)
    stopping = threading.Event()
    try:
        access = _credentials(credentials, token_file, tls_cert, tls_key, host, insecure=insecure)
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
        server = start(engine, config, f"[{host}]:{port}" if ":" in host else f"{host}:{port}", access)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stopping.set())
        address = _reachable(server.address)
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


def _credentials(
    folder: Path | None,
    token_file: Path | None,
    tls_cert: Path | None,
    tls_key: Path | None,
    host: str,
    *,
    insecure: bool,
) -> Credentials:
    from dataclasses import replace

    from services.errors import UsageError
    from services.security import Credentials, open_credentials, read_certificate, read_key, read_token

    if folder is not None:
        if token_file or tls_cert or tls_key:
            raise UsageError(
                "--credentials has token, certificate and key: leave out --token-file, --tls-cert, --tls-key"
            )
        return replace(open_credentials(folder, _names(host)), insecure=insecure)
    if (tls_cert is None) != (tls_key is None):
        raise UsageError("--tls-cert and --tls-key go together: give both or neither")
    certificate = read_certificate(tls_cert) if tls_cert else None
    return Credentials(
        token=read_token(token_file) if token_file else None,
        certificate=certificate,
        key=read_key(tls_key, certificate) if tls_key and certificate else None,
        insecure=insecure,
    )


def _names(host: str) -> list[str]:
    """Names and addresses of this machine that a new certificate stands for."""
    own = socket.gethostname()
    try:
        addresses = [str(info[4][0]).partition("%")[0] for info in socket.getaddrinfo(own, None)]
    except OSError:  # a machine need not know its own name
        addresses = []
    return [own, "localhost", "127.0.0.1", *addresses, *([] if _is_any(host) else [host])]


def _is_any(host: str) -> bool:
    return host in ("", "0.0.0.0", "::")


def _reachable(address: str) -> str:
    """The address that others call; a server that listens on every interface has this machine's name."""
    host, _, port = address.rpartition(":")
    return f"{socket.gethostname()}:{port}" if _is_any(host.strip("[]")) else address


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
