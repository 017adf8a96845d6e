"""Who may connect to what: bind rules, and the token and certificate of a run.

What listens on the loopback interface can be reached from its own machine alone. Beyond that a server needs a token,
which says who may call, and TLS, which keeps the token and everything else from being read on the way; or its owner
says `insecure`. The certificate is made for one run, signs itself, and is the only one that the run's clients accept.
"""

from __future__ import annotations

import hmac
import ipaddress
import os
import secrets
import ssl
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Self

from services.errors import UsageError

if TYPE_CHECKING:
    from cryptography import x509

TOKEN_BYTES = 24

LEAST_TOKEN_CHARACTERS = 16
"""A token of the user's own must not be guessed."""

NAME = "slipstream"
"""The name in the certificates made here: the machines that a run's targets will be on are not known before."""

VALID_DAYS = 3650
"""Longer than any run: a certificate that ends would cut a running job off from its targets."""

CLOCK_SKEW = timedelta(days=1)
"""Clocks of other machines may be behind by so much."""

TOKEN_FILE, CERTIFICATE_FILE, KEY_FILE = "token", "certificate.pem", "key.pem"


@dataclass(frozen=True)
class Credentials:
    """What one end of a connection has.

    Attributes:
        token: What a client must show; None lets everyone call.
        certificate: PEM. A server shows it; to a client it is the only root. None is a connection without TLS.
        key: PEM of the private key; a server's alone.
        name: The name that a client expects in the certificate; None is that of the address.
        insecure: The token may be sent, and asked for, without TLS beyond the loopback interface.
    """

    token: str | None = field(default=None, repr=False)
    certificate: bytes | None = None
    key: bytes | None = field(default=None, repr=False)
    name: str | None = None
    insecure: bool = False

    @classmethod
    def make(cls, *, insecure: bool = False) -> Self:
        """A new token, key and certificate."""
        certificate, key = make_certificate([NAME])
        return cls(make_token(), certificate, key, NAME, insecure)

    @property
    def has_tls(self) -> bool:
        """Whether the connection is encrypted."""
        return self.certificate is not None

    def at(self, host: str) -> Credentials:
        """What of it is used on a connection to `host`: on the loopback interface, or if insecure, no TLS."""
        if is_loopback(host) or self.insecure:
            return replace(self, certificate=None, key=None, name=None)
        return self

    def for_client(self) -> Credentials:
        """The same without the private key."""
        return replace(self, key=None)

    def refusal(self, authorization: str | None) -> str | None:
        """Why an `authorization` header opens nothing; None if it does. Takes the same time for every wrong token."""
        if self.token is None:
            return None
        if not authorization:
            return "this server needs a token: send the header 'authorization: Bearer TOKEN'"
        scheme, _, given = authorization.partition(" ")
        if scheme.lower() != "bearer":
            return "the authorization header must be 'Bearer TOKEN'"
        if not hmac.compare_digest(given.strip().encode(), self.token.encode()):
            return "this token is wrong: take the one of this server; each run makes its own"
        return None


def make_token() -> str:
    """A token that cannot be guessed."""
    return secrets.token_urlsafe(TOKEN_BYTES)


def make_certificate(names: Sequence[str], *, valid_days: float = VALID_DAYS) -> tuple[bytes, bytes]:
    """A self-signed certificate and its private key, both PEM.

    Args:
        names: DNS names and IP addresses that it stands for.
        valid_days: From now on.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, NAME)])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(now + timedelta(days=valid_days))
        .add_extension(x509.SubjectAlternativeName([_general_name(each) for each in names]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    return (
        certificate.public_bytes(serialization.Encoding.PEM),
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
    )


def _general_name(name: str) -> x509.GeneralName:
    from cryptography import x509

    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def is_loopback(host: str) -> bool:
    """Whether only this machine can connect to `host`: an address, or a name; names other than localhost are not."""
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def check_listening(what: str, host: str, *, token: bool, tls: bool, insecure: bool, ways: str) -> None:
    """Refuse to listen where others could call without a token, or read along.

    Args:
        what: Names the server.
        host: Where it shall listen.
        token: Whether it asks for a token.
        tls: Whether it speaks TLS.
        insecure: Its owner takes the risk.
        ways: How a user gives token and TLS, or takes the risk: the way out.

    Raises:
        UsageError: It must not listen there.
    """
    if is_loopback(host) or insecure or (token and tls):
        return
    missing = " and ".join(name for name, given in (("token", token), ("TLS", tls)) if not given)
    raise UsageError(
        f"{what} cannot listen there: {host!r} is not on the loopback interface, and without {missing} whoever reaches "
        f"it could use it or read along. {ways}"
    )


def read_token(path: Path) -> str:
    """The token in a file.

    Raises:
        UsageError: There is no such file, or what it holds is too short for a token.
    """
    token = _read(path, "token").decode(errors="replace").strip()
    if len(token) < LEAST_TOKEN_CHARACTERS or not token.isascii() or not token.isprintable() or " " in token:
        raise UsageError(
            f"token file {path} must hold at least {LEAST_TOKEN_CHARACTERS} printable characters in one word, and has "
            f"{len(token)}; make one with: openssl rand -hex 24"
        )
    return token


def read_certificate(path: Path) -> bytes:
    """A certificate, or a chain of them, in PEM.

    Raises:
        UsageError: There is none.
    """
    pem = _read(path, "certificate")
    try:
        ssl.create_default_context(cadata=pem.decode("ascii"))
    except (ssl.SSLError, ValueError) as error:
        raise UsageError(f"{path} holds no PEM certificate: {error}") from error
    return pem


def read_key(path: Path, certificate: bytes) -> bytes:
    """A private key in PEM that belongs to a certificate which is valid now.

    Raises:
        UsageError: There is none, it belongs to another certificate, or that one is not valid now.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    pem = _read(path, "key")
    try:
        key = load_pem_private_key(pem, password=None)
    except (ValueError, TypeError) as error:  # a TypeError asks for a password
        raise UsageError(f"{path} holds no PEM private key without a passphrase") from error
    shown = x509.load_pem_x509_certificate(certificate)
    if key.public_key() != shown.public_key():
        raise UsageError(f"the key in {path} does not belong to the certificate: give the pair")
    begin, end, now = shown.not_valid_before_utc, shown.not_valid_after_utc, datetime.now(UTC)
    if not begin <= now <= end:
        raise UsageError(
            f"the certificate is valid from {begin:%Y-%m-%d %H:%M} to {end:%Y-%m-%d %H:%M} UTC, and it is "
            f"{now:%Y-%m-%d %H:%M}: renew it"
        )
    return pem


def open_credentials(folder: Path, names: Sequence[str]) -> Credentials:
    """A server's credentials in a folder, made on first use: token, certificate and key, files of this user alone.

    Args:
        folder: Where they lie; made if it is missing.
        names: What a new certificate stands for, besides `NAME`.

    Raises:
        UsageError: The folder cannot be written to, or holds files that are no credentials.
    """
    files = [folder / name for name in (TOKEN_FILE, CERTIFICATE_FILE, KEY_FILE)]
    if not any(file.exists() for file in files):
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            certificate, key = make_certificate([NAME, *dict.fromkeys(names)])
            for file, content in zip(files, (make_token().encode() + b"\n", certificate, key), strict=True):
                write_private(file, content)
        except OSError as error:
            raise UsageError(f"cannot write credentials to {folder}: {error.strerror}") from error
    certificate = read_certificate(files[1])
    return Credentials(read_token(files[0]), certificate, read_key(files[2], certificate))


def write_private(path: Path, content: bytes) -> None:
    """Write a new file that only this user can read, not even for a moment anyone else."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)


def _read(path: Path, what: str) -> bytes:
    try:
        return path.expanduser().read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read {what} file {path}: {error.strerror}") from error
