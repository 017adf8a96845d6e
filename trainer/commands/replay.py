"""`slipstream replay serve`: a replay buffer by itself, for producers and consumers that speak gRPC."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

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
    from services.contracts import TableSignature
    from services.replay.config import ReplayConfig
    from services.security import Credentials

DEFAULT_PORT = 50052
"""The one after a target's."""

CHECK_EVERY_S = 0.3
"""How often an embedded Redis is looked at, to be started again."""

GRACE_S = 10.0
"""How long samples that are on their way may go on after Ctrl-C."""

EMBEDDED = "embedded"

SETTINGS = ("capacity", "reuse", "selector", "min_size", "samples_per_insert", "error_buffer")
"""Options that are settings of a recipe's `replay` section, too."""

app = typer.Typer(no_args_is_help=True, help="A replay buffer by itself, outside any run.")


@app.callback()
def replay() -> None:
    """A replay buffer by itself, outside any run."""


@app.command()
def serve(
    redis: Annotated[
        str,
        typer.Option(
            metavar="URL",
            help="Your Redis: redis://, rediss://, unix://; its password may come from SLIPSTREAM_REDIS_PASSWORD. "
            "'embedded' starts one that ends with the service.",
        ),
    ],
    capacity: Annotated[
        str, typer.Option(metavar="BYTES", help="Most resident feature bytes, samples on their way included: 4GiB.")
    ] = "4GiB",
    layers: Annotated[
        str, typer.Option(metavar="IDS", help="Layers of the context features, in their order: 1,9,17,25,33.")
    ] = "",
    dtype: Annotated[
        Literal["bf16", "fp16", "fp32", "fp8_e4m3"],
        typer.Option(help="dtype of the features; fp8_e4m3 has a scale behind each hidden state."),
    ] = "bf16",
    signature_from: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="A target that knows fingerprint and hidden size; asked once."),
    ] = None,
    target_token_file: Annotated[Path | None, typer.Option(help="File with the token of that target.")] = None,
    target_cert: Annotated[Path | None, typer.Option(help="Certificate of that target (PEM).")] = None,
    fingerprint: Annotated[
        str | None, typer.Option(help="Without --signature-from: names the target; producers give the same.")
    ] = None,
    hidden_size: Annotated[int | None, typer.Option(min=1, help="Without --signature-from: of the target.")] = None,
    reuse: Annotated[int, typer.Option(min=1, help="Uses that one sample may feed; the last one frees it.")] = 1,
    selector: Annotated[
        Literal["fifo", "uniform", "prioritized"], typer.Option(help="Which sample comes next.")
    ] = "fifo",
    min_size: Annotated[int, typer.Option(min=1, help="Samples that must be there before any is leased.")] = 1,
    samples_per_insert: Annotated[
        int | None, typer.Option(min=1, help="With --error-buffer: uses expected of a sample; --reuse by default.")
    ] = None,
    error_buffer: Annotated[
        int | None,
        typer.Option(min=1, help="Uses by which producers and consumers may be apart; bytes alone decide by default."),
    ] = None,
    advertise_redis: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Redis as consumers reach it, to read chunks there; they are told it without its password. By default "
            "they have chunks streamed.",
        ),
    ] = None,
    name: Annotated[str, typer.Option(help="Of the buffer: its keys in Redis begin with slipstream:NAME.")] = "replay",
    host: HostOption = "127.0.0.1",
    port: PortOption = DEFAULT_PORT,
    credentials: CredentialsOption = None,
    token_file: TokenFileOption = None,
    tls_cert: CertificateOption = None,
    tls_key: KeyOption = None,
    insecure: InsecureOption = False,
    max_inserts: Annotated[int, typer.Option(min=1, help="Producers at once; more are refused.")] = 32,
    max_leases: Annotated[int, typer.Option(min=1, help="Lease calls at once; more are refused.")] = 32,
    as_json: JsonOption = False,
) -> None:
    """Serve a bounded replay buffer of captured features over gRPC until Ctrl-C.

    Producers insert samples, wait for credit while the buffer is full, and may send a sample again when in doubt.
    Consumers lease, train, acknowledge; the last acknowledgement of a sample frees its bytes. What is committed stays
    in your Redis, and the same command goes on with it. On this machine anyone may call; beyond it callers need a
    token, and the connection is encrypted. docs/replay-service.md shows a producer in 20 lines.

    Example: slipstream replay serve --redis embedded --signature-from 127.0.0.1:50051 --layers 1,9,17

    Example: slipstream replay serve --redis redis://cache:6379/0 --fingerprint mine --hidden-size 2560 --layers 1,9
    """
    from services.memory import keep_freed_memory

    keep_freed_memory()
    from services.errors import SlipstreamError
    from services.security import check_listening
    from trainer.console import RunConsole

    console = RunConsole(to_stderr=as_json)
    stopping = threading.Event()
    try:
        access = credentials_of(credentials, token_file, tls_cert, tls_key, host, insecure=insecure)
        check_listening(
            "the replay service",
            host,
            token=access.token is not None,
            tls=access.has_tls,
            insecure=insecure,
            ways=WAYS_TO_LISTEN,
        )
        config = _config(
            redis=redis,
            capacity=capacity,
            reuse=reuse,
            selector=selector,
            min_size=min_size,
            samples_per_insert=samples_per_insert,
            error_buffer=error_buffer,
            wire_dtype=dtype,
        )
        signature = _signature(
            _layers(layers), config, signature_from, target_token_file, target_cert, fingerprint, hidden_size
        )
        from services.replay.service import serve as start
        from services.replay.service_config import ServiceConfig

        prefix = _prefix(name)
        limits = ServiceConfig(max_inserts=max_inserts, max_leases=max_leases, chunks_url=advertise_redis)
        with _redis(config, prefix) as place:
            owner = f"the replay service on {socket.gethostname()} at {host}:{port or os.getpid()}"
            service = start(place.url, prefix, config, signature, limits, join(host, port), access, owner=owner)
            try:
                for number in (signal.SIGINT, signal.SIGTERM):
                    signal.signal(number, lambda *_: stopping.set())
                address = reachable(service.address)
                if as_json:
                    print(json.dumps(_place(address, prefix, config, signature, access)), flush=True)
                console.say(_greeting(address, config, signature, access, credentials))
                while not stopping.wait(CHECK_EVERY_S):
                    service.check()
                    if news := place.keep_alive():
                        console.say(news)
            finally:
                service.stop(GRACE_S)
    except SlipstreamError as error:
        fail(console, str(error), error.exit_code)
    except KeyboardInterrupt:
        fail(console, "stopped before it served", 1)
    console.say("stopped")


class _Redis(NamedTuple):
    url: str
    keep_alive: Callable[[], str | None]


@contextlib.contextmanager
def _redis(config: ReplayConfig, prefix: str) -> Iterator[_Redis]:
    """The Redis that holds the buffer; an embedded one ends with the context."""
    from services.replay.connect import check_server, connect
    from services.replay.embedded import EmbeddedRedis
    from services.replay.urls import with_password

    if config.redis == EMBEDDED:
        with (
            tempfile.TemporaryDirectory(prefix="slipstream-replay-") as folder,
            EmbeddedRedis.start(Path(folder), config.capacity) as embedded,
        ):
            yield _Redis(embedded.url, embedded.keep_alive)
        return
    (url,) = (with_password(url, os.environ) for url in config.urls)
    with contextlib.closing(connect(url)) as client:
        check_server(client, config.capacity, prefix)
    yield _Redis(url, lambda: None)


def _config(**settings: Any) -> ReplayConfig:
    from pydantic import ValidationError

    from services.errors import UsageError
    from services.replay.config import ReplayConfig

    try:
        return ReplayConfig(**settings)
    except ValidationError as error:
        raise UsageError("; ".join(_as_options(item) for item in error.errors())) from error


def _as_options(item: Any) -> str:
    """What is wrong with a setting, in terms of the options."""
    message = str(item["msg"]).removeprefix("Value error, ")
    if item["loc"]:
        message = f"{item['loc'][0]} {item['input']!r}: {message}"
    names = "|".join(SETTINGS)
    return re.sub(rf"(replay\.)?\b({names})\b", lambda found: "--" + found[2].replace("_", "-"), message)


def _prefix(name: str) -> str:
    from services.errors import UsageError

    if not re.fullmatch(r"[\w.-]+", name):
        raise UsageError(f"--name {name!r} must be of letters, digits, '.', '_' and '-'")
    return f"slipstream:{name}"


def _layers(text: str) -> tuple[int, ...]:
    from services.errors import UsageError

    try:
        layers = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UsageError(
            f"--layers {text!r} is no list of layer numbers: give those of the drafter's features, as in 1,9,17,25,33"
        ) from None
    if len(set(layers)) < len(layers) or min(layers) < -1:
        raise UsageError(f"--layers {text} must be different layers, from -1 (the embedding) on")
    return layers


def _signature(
    layers: tuple[int, ...],
    config: ReplayConfig,
    address: str | None,
    token_file: Path | None,
    certificate: Path | None,
    fingerprint: str | None,
    hidden_size: int | None,
) -> TableSignature:
    from services.contracts import TableSignature
    from services.errors import UsageError
    from services.security import Credentials, read_certificate, read_token
    from services.target.client import TargetClient

    if address is None:
        if not fingerprint or hidden_size is None:
            raise UsageError(
                "say what the buffer holds: --signature-from HOST:PORT, or --fingerprint and --hidden-size"
            )
    else:
        if fingerprint or hidden_size is not None:
            raise UsageError(
                "--signature-from knows fingerprint and hidden size: leave out --fingerprint, --hidden-size"
            )
        access = Credentials(
            read_token(token_file) if token_file else None, read_certificate(certificate) if certificate else None
        )
        with TargetClient(address, access) as target:
            described = target.describe()
        if max(layers) > described.num_layers - 2:
            raise UsageError(
                f"--layers name layer {max(layers)}, {described.model_name} has them up to {described.num_layers - 2}"
            )
        fingerprint, hidden_size = described.fingerprint, described.hidden_size
    return TableSignature(fingerprint=fingerprint, layer_ids=layers, hidden_size=hidden_size, dtype=config.wire_dtype)


def _place(
    address: str, prefix: str, config: ReplayConfig, signature: TableSignature, access: Credentials
) -> dict[str, Any]:
    return {
        "address": address,
        "prefix": prefix,
        "capacity_bytes": int(config.capacity),
        "signature": signature.model_dump(mode="json"),
        "token": access.token is not None,
        "tls": access.has_tls,
        "pid": os.getpid(),
    }


def _greeting(
    address: str, config: ReplayConfig, signature: TableSignature, access: Credentials, folder: Path | None
) -> str:
    from trainer.summary import format_bytes

    lines = [
        f"serves a replay buffer of {format_bytes(config.capacity)} at {address}: {len(signature.layer_ids)} layers of "
        f"size {signature.hidden_size} as {signature.dtype}, fingerprint {signature.fingerprint}"
    ]
    if folder is not None:
        lines.append(f"callers need {folder / 'token'} and {folder / 'certificate.pem'}")
    elif access.token is None:
        lines.append("whoever reaches this address may call")
    lines.append("Ctrl-C ends it")
    return "\n".join(lines)
