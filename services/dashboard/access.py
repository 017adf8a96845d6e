"""Who may read and who may steer: one token a dashboard, and no reading beyond this machine without it."""

from __future__ import annotations

import hmac
import ipaddress
import secrets
from dataclasses import dataclass, field

LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class Access:
    """The rules of one dashboard.

    Attributes:
        host: Where it listens.
        token: What steering always needs, and reading where others can reach the page.
    """

    host: str = "127.0.0.1"
    token: str = field(default_factory=lambda: secrets.token_urlsafe(24), repr=False)

    @property
    def is_local(self) -> bool:
        """Whether only this machine can connect."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    @property
    def names(self) -> list[str]:
        """Which names the page answers to: a page elsewhere must not read it through a name that points here."""
        return list(LOCAL_NAMES) if self.is_local else ["*"]

    def refusal(self, authorization: str | None) -> str | None:
        """Why an `Authorization` header opens nothing; None if it does.

        Args:
            authorization: The header, `Bearer <token>`; None where there is none.
        """
        if not authorization:
            return "this needs the dashboard's token: open the link that the command printed, or enter the token"
        scheme, _, given = authorization.partition(" ")
        if scheme.lower() != "bearer":
            return f"the Authorization header must be 'Bearer <token>', not {scheme!r}"
        if not hmac.compare_digest(given.strip().encode(), self.token.encode()):
            return "this token is wrong: each start of a dashboard has its own, in the link that the command printed"
        return None
