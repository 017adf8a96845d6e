from __future__ import annotations

import pytest

from services.errors import UsageError
from services.grpc_access import open_channel
from services.security import Credentials


def test_token_is_not_sent_in_the_clear_beyond_this_machine() -> None:
    with pytest.raises(UsageError, match=r"a token for 10\.0\.0\.1:5 would travel without TLS"):
        open_channel("10.0.0.1:5", Credentials(token="t"), [])
    open_channel("10.0.0.1:5", Credentials(token="t", insecure=True), []).close()
    open_channel("127.0.0.1:5", Credentials(token="t"), []).close()
    open_channel("10.0.0.1:5", Credentials(), []).close()
