"""The end of a run whose driver is a process of this machine; that of a desk is in tests/e2e/test_steering_a_run.py."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
from test_control_wire import BARE

from services.control import ending as ending_module
from services.control.ending import RunEnd, open_driver
from services.errors import DeadlineError

HERE = "this-machine"
WAIT_S = 120.0

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="pidfd is Linux's")


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[subprocess.Popen[bytes]]:
    """A process that ends with its standard input."""
    monkeypatch.setattr(ending_module.socket, "gethostname", lambda: HERE)
    with subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE) as process:
        yield process
        process.kill()


def test_driver_that_has_ended_is_noticed_before_its_parent_looks(driver: subprocess.Popen[bytes]) -> None:
    end = RunEnd("demo-aaaaaa", open_driver(BARE.model_copy(update={"host": HERE, "pid": driver.pid})))
    assert driver.stdin is not None
    driver.stdin.close()
    end.wait(WAIT_S)
    assert driver.returncode is None


def test_driver_that_goes_on_is_named_at_the_deadline(driver: subprocess.Popen[bytes]) -> None:
    end = RunEnd("demo-aaaaaa", open_driver(BARE.model_copy(update={"host": HERE, "pid": driver.pid})))
    with pytest.raises(DeadlineError, match=r"demo-aaaaaa has not ended within 0.01 s"):
        end.wait(0.01)


def test_driver_elsewhere_is_out_of_reach(driver: subprocess.Popen[bytes]) -> None:
    assert open_driver(BARE.model_copy(update={"host": "other", "pid": driver.pid})) is None
