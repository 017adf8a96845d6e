from __future__ import annotations

import pytest

from services.dashboard.access import Access


def test_each_dashboard_has_its_own_token_and_does_not_show_it() -> None:
    one, two = Access(), Access()
    assert one.token != two.token
    assert len(one.token) >= 32
    assert one.token not in repr(one)


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (None, "needs the dashboard's token"),
        ("", "needs the dashboard's token"),
        ("Basic c2VjcmV0", "must be 'Bearer <token>'"),
        ("Bearer wrong", "token is wrong"),
        ("Bearer ", "token is wrong"),
        ("Bearer sécret", "token is wrong"),
    ],
)
def test_everything_but_the_token_is_refused_with_a_reason(header: str | None, words: str) -> None:
    refusal = Access(token="secret").refusal(header)
    assert refusal is not None
    assert words in refusal
    assert "secret" not in refusal.replace("'Bearer <token>'", "")


@pytest.mark.parametrize("header", ["Bearer secret", "bearer secret", "Bearer  secret "])
def test_token_is_accepted(header: str) -> None:
    assert Access(token="secret").refusal(header) is None


@pytest.mark.parametrize(
    ("host", "is_local"),
    [
        ("127.0.0.1", True),
        ("127.8.8.8", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("node-3", False),
    ],
)
def test_only_loopback_is_local(host: str, is_local: bool) -> None:
    assert Access(host).is_local is is_local
