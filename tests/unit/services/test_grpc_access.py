from __future__ import annotations

import grpc
import pytest

from services import grpc_access
from services.errors import UsageError
from services.grpc_access import open_channel, why_refused
from services.security import Credentials


def test_token_is_not_sent_in_the_clear_beyond_this_machine() -> None:
    with pytest.raises(UsageError, match=r"a token for 10\.0\.0\.1:5 would travel without TLS"):
        open_channel("10.0.0.1:5", Credentials(token="t"), [])
    open_channel("10.0.0.1:5", Credentials(token="t", insecure=True), []).close()
    open_channel("127.0.0.1:5", Credentials(token="t"), []).close()
    open_channel("10.0.0.1:5", Credentials(), []).close()


class Failed(grpc.RpcError):
    def __init__(self, details: str) -> None:
        self._details = details

    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.UNAVAILABLE

    def details(self) -> str:
        return self._details


@pytest.mark.parametrize("words", ["Socket closed", "recvmsg:Connection reset by peer", "sendmsg: Broken pipe (32)"])
def test_end_that_hung_up_and_speaks_tls_is_told(words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpc_access, "_speaks_tls", lambda address: True)
    assert "it speaks TLS" in (why_refused(Failed(words), "10.0.0.1:5", Credentials()) or "")
    monkeypatch.setattr(grpc_access, "_speaks_tls", lambda address: False)
    assert why_refused(Failed(words), "10.0.0.1:5", Credentials()) is None
