"""URLs in messages show no password."""

from __future__ import annotations

import pytest

from services.replay.connect import safe_url


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://host:6379/0", "redis://host:6379/0"),
        ("rediss://user:secret@host:6379/0", "rediss://user:***@host:6379/0"),
        ("redis://:p%40ss@host", "redis://:***@host"),
        ("redis://:a@b:c@host", "redis://:***@host"),
        ("unix:///tmp/redis.sock", "unix:///tmp/redis.sock"),
        ("unix:///tmp/redis.sock?db=1&password=secret", "unix:///tmp/redis.sock?db=1&password=***"),
        ("unix://user:secret@/tmp/redis.sock", "unix://user:***@/tmp/redis.sock"),
        ("redis://[broken", "(a URL that cannot be read)"),
        ("nonsense", "nonsense"),
    ],
)
def test_password_is_hidden_and_the_rest_kept(url: str, shown: str) -> None:
    assert safe_url(url) == shown
