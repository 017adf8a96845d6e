"""Who may listen where, and what a run's token and certificate are worth."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from services.errors import UsageError
from services.security import (
    Credentials,
    check_listening,
    is_loopback,
    make_certificate,
    make_token,
    open_credentials,
    read_certificate,
    read_key,
    read_token,
    write_private,
)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "[::1]", "localhost"])
def test_loopback_needs_neither_token_nor_tls(host: str) -> None:
    assert is_loopback(host)
    check_listening("it", host, token=False, tls=False, insecure=False, ways="")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "[::]", "10.0.0.1", "", "example.org", "localhost.example.org"])
@pytest.mark.parametrize(
    ("token", "tls", "missing"),
    [(False, False, "token and TLS"), (True, False, "TLS"), (False, True, "token")],
)
def test_listening_beyond_loopback_needs_token_and_tls_or_insecure(
    host: str, token: bool, tls: bool, missing: str
) -> None:
    assert not is_loopback(host)
    with pytest.raises(UsageError, match=f"the server .* without {missing} whoever .* do this"):
        check_listening("the server", host, token=token, tls=tls, insecure=False, ways="do this")
    check_listening("it", host, token=token, tls=tls, insecure=True, ways="")
    check_listening("it", host, token=True, tls=True, insecure=False, ways="")


def test_credentials_show_neither_token_nor_key() -> None:
    made = Credentials.make()
    assert made.token is not None
    assert len(made.token) >= 32
    assert made.token not in repr(made)
    assert made.key is not None
    assert made.key.decode() not in repr(made)
    assert "PRIVATE" not in repr(made)
    assert made.for_client().key is None
    assert made.for_client().token == made.token


def test_each_run_has_its_own() -> None:
    one, other = Credentials.make(), Credentials.make()
    assert one.token != other.token
    assert one.certificate != other.certificate


def test_tls_is_used_beyond_loopback_unless_insecure() -> None:
    made = Credentials.make()
    assert made.at("10.0.0.1") == made
    assert not made.at("127.0.0.1").has_tls
    assert made.at("127.0.0.1").token == made.token
    open_one = Credentials.make(insecure=True).at("10.0.0.1")
    assert not open_one.has_tls
    assert open_one.token is not None


@pytest.mark.parametrize(
    ("header", "says"),
    [
        (None, "needs a token"),
        ("", "needs a token"),
        ("Basic abc", "Bearer"),
        ("Bearer", "token is wrong"),
        ("Bearer wrong", "token is wrong"),
        ("Bearer the-right-tokenx", "token is wrong"),
        ("Bearer naïve", "token is wrong"),
        ("Bearer the-right-token", None),
        ("bearer  the-right-token ", None),
    ],
)
def test_only_the_token_opens(header: str | None, says: str | None) -> None:
    refusal = Credentials(token="the-right-token").refusal(header)
    assert (refusal is None) == (says is None)
    assert says is None or says in str(refusal)
    assert "the-right-token" not in str(refusal)


def test_server_without_token_lets_everyone_call() -> None:
    assert Credentials().refusal(None) is None


def test_folder_of_credentials_is_made_once_for_this_user_alone(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "credentials"
    made = open_credentials(folder, ["10.0.0.1", "10.0.0.1", "host.example.org"])
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {
        "token": 0o600,
        "certificate.pem": 0o600,
        "key.pem": 0o600,
    }
    assert open_credentials(folder, []) == made
    (folder / "key.pem").write_bytes(make_certificate(["other"])[1])
    with pytest.raises(UsageError, match="does not belong to the certificate"):
        open_credentials(folder, [])
    (folder / "key.pem").unlink()
    with pytest.raises(UsageError, match=r"cannot read key file .*key\.pem: No such file"):
        open_credentials(folder, [])


def test_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"cannot write credentials to .*file/credentials: Not a directory"):
        open_credentials(tmp_path / "file" / "credentials", [])


@pytest.mark.parametrize("content", ["short", "two words that are long enough", "", "ünïcödé-ünïcödé-ünïcödé"])
def test_file_that_holds_no_token_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "token"
    path.write_text(content)
    with pytest.raises(UsageError, match=r"at least 16 printable characters.*openssl rand"):
        read_token(path)


def test_token_is_read_without_the_end_of_its_line(tmp_path: Path) -> None:
    token = make_token()
    (tmp_path / "token").write_text(f"{token}\n")
    assert read_token(tmp_path / "token") == token


def test_files_that_are_no_certificate_and_no_key_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "rubbish.pem"
    path.write_text("rubbish")
    with pytest.raises(UsageError, match="holds no PEM certificate"):
        read_certificate(path)
    with pytest.raises(UsageError, match="holds no PEM private key"):
        read_key(path, make_certificate(["host"])[0])


def test_certificate_that_has_expired_is_refused(tmp_path: Path) -> None:
    certificate, key = make_certificate(["host"], valid_days=-0.5)
    write_private(tmp_path / "key.pem", key)
    with pytest.raises(UsageError, match=r"the certificate is valid from .* renew it"):
        read_key(tmp_path / "key.pem", certificate)
