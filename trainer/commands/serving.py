"""What the commands that serve share: where to listen, and who gets in. Nothing heavy is imported here."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from services.security import Credentials

WAYS_TO_LISTEN = (
    "Give --credentials DIR, or --token-file with --tls-cert and --tls-key; or --insecure, on a network you trust; or "
    "listen on 127.0.0.1 and forward the port"
)

HostOption = Annotated[str, typer.Option(help="Where to listen; beyond this machine only with token and TLS.")]
PortOption = Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")]
CredentialsOption = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Folder with token, certificate.pem and key.pem; made on first use. Callers need the first two.",
    ),
]
TokenFileOption = Annotated[Path | None, typer.Option(help="File with the token that every call must carry.")]
CertificateOption = Annotated[Path | None, typer.Option(help="Certificate, or chain of them (PEM).")]
KeyOption = Annotated[Path | None, typer.Option(help="Its private key (PEM).")]
InsecureOption = Annotated[
    bool, typer.Option("--insecure", help="Listen anywhere without what is missing. Only on a network you trust.")
]


def credentials_of(
    folder: Path | None,
    token_file: Path | None,
    tls_cert: Path | None,
    tls_key: Path | None,
    host: str,
    *,
    insecure: bool,
) -> Credentials:
    """What a server that was started with these options shows and asks for.

    Raises:
        UsageError: They do not go together, or a file holds something else.
    """
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


def reachable(address: str) -> str:
    """The address that others call; a server that listens on every interface has this machine's name."""
    host, _, port = address.rpartition(":")
    return f"{socket.gethostname()}:{port}" if _is_any(host.strip("[]")) else address


def join(host: str, port: int) -> str:
    """host:port, for IPv6 as well."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
