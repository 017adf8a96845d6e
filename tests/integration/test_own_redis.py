"""A user's own Redis with a password, a user of few rights, and TLS."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from own_redis import ADMIN_PASSWORD, PASSWORD, USER, OwnRedis, own_redis, tls_in_front_of

from services.contracts import TableSignature
from services.errors import ReplayError, ReplayUnavailableError
from services.replay.connect import check_server, claim, connect
from services.replay.table import RedisTable
from services.replay.urls import PASSWORD_VARIABLE, with_password

PREFIX = "slipstream:run-1"
SIGNATURE = TableSignature(fingerprint="f", layer_ids=(0,), hidden_size=4, dtype="fp32")
ENVIRONMENT = {PASSWORD_VARIABLE: PASSWORD}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OwnRedis]:
    with own_redis(tmp_path_factory.mktemp("redis")) as running:
        yield running


def use(url: str) -> None:
    """What a run does at its start and its end."""
    client = connect(url)
    check_server(client, 1_000_000, PREFIX)
    with claim(client, PREFIX, owner="here"):
        table = RedisTable(client, PREFIX)
        table.create(1_000_000, SIGNATURE, 1)
        assert table.info().capacity_bytes == 1_000_000
        table.destroy()
    client.close()


def test_password_of_the_environment_opens_it(server: OwnRedis) -> None:
    use(with_password(server.url, ENVIRONMENT))


def test_keys_of_others_are_in_nobodys_way(server: OwnRedis) -> None:
    admin = connect(f"redis://:{ADMIN_PASSWORD}@{server.address}/0")
    admin.hset("foreign:table", "capacity", 10**12)
    use(with_password(server.url, ENVIRONMENT))
    admin.delete("foreign:table")
    admin.close()


@pytest.mark.parametrize("environment", [{}, {PASSWORD_VARIABLE: "wrong"}])
def test_login_that_is_refused_says_how_to_give_it(server: OwnRedis, environment: dict[str, str]) -> None:
    with pytest.raises(ReplayUnavailableError, match=f"refuses the login.*{PASSWORD_VARIABLE}") as refused:
        connect(with_password(server.url, environment))
    assert "wrong" not in str(refused.value).replace("wrong number", "")


def test_password_that_is_not_encoded_in_a_url_is_not_repeated(server: OwnRedis) -> None:
    with pytest.raises(ReplayError, match="percent-encoded") as refused:
        connect(f"redis://{USER}:{PASSWORD}@{server.address}/0")
    for part in ("Xq7", "p@ss", "w#rd", "rd?"):
        assert part not in str(refused.value)
    assert refused.value.__cause__ is None


def test_forbidden_command_names_the_rights_that_are_needed(server: OwnRedis) -> None:
    client = connect(with_password(server.url, ENVIRONMENT))
    with pytest.raises(ReplayError, match=r"forbids.*~slipstream:\*"):
        client.set("elsewhere", 1)


def test_tls_is_checked_against_the_certificate_given(server: OwnRedis, tmp_path: Path) -> None:
    with tls_in_front_of(server.address, tmp_path) as proxy:
        url = f"rediss://{USER}@{proxy.address}/0"
        use(with_password(f"{url}?ssl_ca_certs={proxy.certificate}", ENVIRONMENT))
        with pytest.raises(ReplayUnavailableError, match=r"CERTIFICATE_VERIFY_FAILED|certificate verify failed"):
            connect(with_password(url, ENVIRONMENT))
