"""Who may read and who may steer: one token a dashboard; beyond this machine nothing without it, nor without TLS."""

from __future__ import annotations

import hmac
from dataclasses import dataclass, field
from pathlib import Path

from services.security import check_listening, is_loopback, make_token

WAYS_TO_LISTEN = (
    "Give --tls-cert and --tls-key; or --insecure, on a network you trust; or listen on 127.0.0.1 and forward the port"
)

LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class Access:
    """The rules of one dashboard.

    Attributes:
        host: Where it listens.
        token: What steering always needs, and reading where others can reach the page.
        certificate: File in PEM; with it and its key the page is served over TLS.
        key: File in PEM.
        insecure: Its owner lets the page be served beyond this machine without TLS.
    """

    host: str = "127.0.0.1"
    token: str = field(default_factory=make_token, repr=False)
    certificate: Path | None = None
    key: Path | None = None
    insecure: bool = False

    @property
    def has_tls(self) -> bool:
        """Whether the page is encrypted on its way."""
        return self.certificate is not None

    @property
    def is_local(self) -> bool:
        """Whether only this machine can connect."""
        return is_loopback(self.host)

    def check(self) -> None:
        """Check that the page may be served there.

        Raises:
            UsageError: Others could read along.
        """
        check_listening(
            "the dashboard", self.host, token=True, tls=self.has_tls, insecure=self.insecure, ways=WAYS_TO_LISTEN
        )

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
