"""`slipstream target serve` as a user runs it, and our own client against it."""

from __future__ import annotations

import json
import select
import signal
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import Command

import trainer
from services.contracts import CaptureJob
from services.errors import TargetAccessError
from services.security import Credentials, read_certificate, read_token
from services.target.client import TargetClient

Start = Callable[..., Command]

TARGET = str(Path(trainer.__file__).parent / "demo" / "target")
CPU = ("--cpu", "--dtype", "float32", "--threads", "1", "--port", "0", "--json")
START_S = 300.0


def first_line(command: Command) -> dict[str, Any]:
    """The JSON object that a serving target prints."""
    assert command.process.stdout is not None
    deadline_s = time.monotonic() + START_S
    readable: list[object] = []
    while not readable and command.process.poll() is None and time.monotonic() < deadline_s:
        readable, _, _ = select.select([command.process.stdout], [], [], 0.2)
    line = command.process.stdout.readline() if readable else ""
    assert line, command.errors
    place: dict[str, Any] = json.loads(line)
    return place


def num_rows(client: TargetClient) -> int:
    job = CaptureJob(capture=1, prompt=0, epoch=0, input_ids=(1, 2, 3), loss_mask=(1, 1, 1), last_rows=(2,))
    stream = client.capture(job, layer_ids=(0,), wire_dtype="fp32", chunk_bytes=1024**2, timeout_s=START_S)
    return sum(chunk.row_end - chunk.row_start for chunk, _ in stream)


def test_target_serves_this_machine_until_it_is_interrupted(slipstream: Start) -> None:
    command = slipstream("target", "serve", TARGET, *CPU)
    place = first_line(command)
    assert (place["token"], place["tls"], place["model"]) == (False, False, TARGET)
    with TargetClient(place["address"]) as client:
        assert client.describe().fingerprint == place["fingerprint"]
        assert num_rows(client) == 4
    command.signal_group(signal.SIGINT)
    code, rest = command.result()
    assert (code, rest) == (0, "")
    assert "stopped" in command.errors
    assert "Traceback" not in command.errors
    command.assert_nothing_left()


def test_target_with_credentials_serves_who_has_token_and_certificate(slipstream: Start, tmp_path: Path) -> None:
    folder = tmp_path / "credentials"
    command = slipstream("target", "serve", TARGET, "--host", "0.0.0.0", "--credentials", str(folder), *CPU)
    place = first_line(command)
    assert (place["token"], place["tls"]) == (True, True)
    address = f"127.0.0.1:{place['address'].rpartition(':')[2]}"
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}
    certificate, token = read_certificate(folder / "certificate.pem"), read_token(folder / "token")
    with TargetClient(address, Credentials(token, certificate)) as client:
        assert num_rows(client) == 4
    with TargetClient(address) as client, pytest.raises(TargetAccessError, match="speaks TLS"):
        client.describe()
    wrong = Credentials("wrong", certificate)
    with TargetClient(address, wrong) as client, pytest.raises(TargetAccessError, match="token is wrong"):
        client.describe()
    command.signal_group(signal.SIGTERM)
    code, _ = command.result()
    assert code == 0
    assert token not in command.errors


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--host", "0.0.0.0"), "without token and TLS whoever reaches it could use it"),
        (("--tls-cert", "c.pem"), "--tls-cert and --tls-key go together"),
        (("--token-file", "nowhere"), "cannot read token file nowhere"),
        (("--credentials", "d", "--token-file", "t"), "leave out --token-file"),
    ],
)
def test_wrong_credentials_are_refused_before_the_model_is_loaded(
    slipstream: Start, tmp_path: Path, arguments: tuple[str, ...], says: str
) -> None:
    command = slipstream("target", "serve", TARGET, *arguments)
    code, _ = command.result()
    assert code == 2
    assert says in " ".join(command.errors.split())
    assert "loading" not in command.errors
