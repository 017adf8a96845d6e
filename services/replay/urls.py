"""URLs of Redis: where their password comes from, and that it is shown nowhere. No Redis."""

from __future__ import annotations

import re
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

PASSWORD_VARIABLE = "SLIPSTREAM_REDIS_PASSWORD"
"""Password of the user's own Redis, so that it need not stand in the recipe or on a command line."""

TCP = "tcp"
"""Query field of a unix:// URL: host:port of the same server for those who are on another machine."""

ARENA = "arena"
"""Query field of any URL, the last one: the shared-memory arena that holds the payloads of that Redis' table."""

HIDDEN = "***"

_LOGIN = re.compile(r"(?<![a-z])(?P<scheme>[a-z]+://)(?P<user>[^:@/?]*)(?P<password>:.*)?@", re.DOTALL)
"""Up to the last @: a password that is not percent-encoded may hold any character. A scheme is looked for where a word
begins, not at each of its letters: a long text without one is soon read."""

_BETWEEN_URLS = re.compile(r"(,\s*)(?=(?:rediss?|unix)://)")
"""Of those of several shards. Any other comma belongs to its URL: passwords may hold them."""

_QUERY_PASSWORD = re.compile(r"(?<=[?&]password=)[^&#\s]*")


def safe_url(url: str) -> str:
    """The URL with its password hidden, for messages."""
    return _replace_password(url, f":{HIDDEN}", HIDDEN)


def without_password(url: str) -> str:
    """The URL without its password, for files: with `with_password` it is good again."""
    bare = _replace_password(url, "", "")
    return re.sub(r"([?&])password=(&|$)", lambda match: match[1] if match[2] else "", bare)


def with_password(url: str, environment: Mapping[str, str]) -> str:
    """The URL with the password that the environment gives, unless it has one of its own."""
    password = environment.get(PASSWORD_VARIABLE)
    scheme, separator, rest = url.partition("://")
    if not password or not separator or safe_url(url) != without_password(url):
        return url
    login, at, place = rest.rpartition("@")
    return f"{scheme}://{login if at else ''}:{quote(password, safe='')}@{place}"


def hide_passwords(arguments: Sequence[str]) -> list[str]:
    """A command line whose URLs show no password."""
    return ["".join(map(safe_url, _BETWEEN_URLS.split(argument))) for argument in arguments]


def reachable(url: str) -> str:
    """Of an embedded Redis' URL the one that is good here: its socket on its own machine, TCP elsewhere."""
    scheme, _, rest = url.partition("://")
    if scheme != "unix":
        return url
    login, _, place = rest.rpartition("@")
    path, _, query = place.partition("?")
    fields = dict(parse_qsl(query))
    address = fields.pop(TCP, None)
    if address is None:
        return url
    # Not the socket itself: that is away for a moment while the server is started again.
    if Path(unquote(path)).parent.is_dir():
        more = f"?{urlencode(fields)}" if fields else ""
        return f"unix://{f'{login}@' if login else ''}{path}{more}"
    return f"redis://{f'{login}@' if login else ''}{address}/0"


def with_arena(url: str, arena: str) -> str:
    """The URL with an arena (`ArenaPlace.text`), for those who shall find the payloads there."""
    return f"{url}{'&' if '?' in url else '?'}{ARENA}={quote(arena, safe='')}"


def split_arena(url: str) -> tuple[str, str | None]:
    """The URL without its arena, and the arena if it has one."""
    match = re.search(rf"[?&]{ARENA}=([^?&]*)$", url)
    return (url[: match.start()], unquote(match[1])) if match else (url, None)


def split_urls(text: str) -> tuple[str, ...]:
    """The URLs of a text that has one a shard, with commas between."""
    return tuple(_BETWEEN_URLS.split(text)[::2])


def is_here(url: str) -> bool:
    """Whether a server is on this machine, by the URL that is good here (`reachable`)."""
    parts = urlsplit(url)
    if parts.scheme == "unix":
        return True
    try:
        family, _, _, _, place = socket.getaddrinfo(parts.hostname, parts.port or 6379, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(place)  # sends nothing; the kernel answers a machine's own address with the same one
            return bool(probe.getsockname()[0] == place[0])
    except OSError:
        return False


def _replace_password(url: str, login: str, query: str) -> str:
    hidden = _LOGIN.sub(
        lambda match: f"{match['scheme']}{match['user']}{login if match['password'] else ''}@", url, count=1
    )
    return _QUERY_PASSWORD.sub(query, hidden)
